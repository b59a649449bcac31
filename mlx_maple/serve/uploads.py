"""Pictures that come in with a request: base64 to a file's bytes, looked at before any decoding."""

import base64
import binascii
import re

from mlx_maple import images
from mlx_maple.images import ImageError

_DATA_URL = re.compile(r"data:[\w.+-]{0,40}/?[\w.+-]{0,40}(?:;[\w=.+-]{0,60}){0,4},", re.ASCII)


def picture_bytes(text: str, most_pixels: int) -> bytes:
    """The file's bytes that a data URL or bare base64 holds.

    Only the picture's head is read: what it declares itself to be, and how large.

    Raises:
        ImageError: it is not base64, no picture of a kind that is read, or has too many pixels.
    """
    if match := _DATA_URL.match(text):
        if ";base64," not in match[0]:
            raise ImageError("a data: URL must be base64")
        text = text[match.end() :]
    try:
        data = base64.b64decode(text.encode("ascii"), validate="\n" not in text)
    except (binascii.Error, UnicodeEncodeError):
        raise ImageError("a picture must be a data: URL or base64") from None
    return checked(data, most_pixels)


def checked(data: bytes, most_pixels: int) -> bytes:
    """The bytes, whose head declares a picture that may be read.

    Raises:
        ImageError: it does not.
    """
    images.check_header(data, most_pixels)
    return data
