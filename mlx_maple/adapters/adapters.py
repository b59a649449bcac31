"""Which LoRAs and learned words a model draws with, and which its networks carry now."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.nn as nn

from mlx_maple.adapters.lora import Choice, Lora, changed_parts, fold, read_choices
from mlx_maple.adapters.textual_inversion import Word, ids_of, set_words, spelled

Encode = Callable[[str], list[int]]  # a text's ids
# A name to what opens the word: words of the models' folders are read when they are used.
Shelf = Mapping[str, Callable[[], Word]]


@dataclass(frozen=True)
class Worn:
    """A LoRA and how strongly it is to be put in."""

    lora: Lora
    choice: Choice

    @property
    def changes(self) -> list[str]:
        """The networks that it changes."""
        return [part for part in changed_parts(self.lora) if self.choice.strength(part)]


class Chosen(NamedTuple):
    """The LoRAs of one drawing.

    Attributes:
        worn: all of them, in order.
        said: those that the prompt does not name itself, as ``Adapters.choose`` takes them.
        notes: what of the files did not fit.
    """

    worn: tuple[Worn, ...]
    said: str
    notes: list[str]

    def within(self, parts: Collection[str]) -> "Chosen":
        """What of them changes these networks, for another model that has the same."""
        worn = []
        for each in self.worn:
            updates = {part: each.lora.updates[part] for part in each.changes if part in parts}
            if updates:
                worn.append(Worn(replace(each.lora, updates=updates, words=()), each.choice))
        return self._replace(worn=tuple(worn))


class Adapters:
    """What is put on top of one model.

    Args:
        open_lora: reads a LoRA by its file or name, for this model.
        shelf: gives the words that can be found by name, for a prompt that has them.
        words: that are there always.
        text_encoders: names of the model's text encoders.
    """

    def __init__(
        self,
        open_lora: Callable[[str], Lora],
        shelf: Callable[[], Shelf] = dict,
        words: Sequence[Word] = (),
        text_encoders: Sequence[str] = ("text_encoder",),
    ) -> None:
        self._open_lora = open_lora
        self._shelf = shelf
        self._own_words = tuple(words)
        self._text_encoders = tuple(text_encoders)
        self._standing: tuple[Worn, ...] = ()
        self._worn: tuple[Worn, ...] = ()
        self._words: tuple[Word, ...] = ()

    # LoRAs ----------------------------------------------------------------------------------

    def stand(self, loras: Any) -> list[str]:
        """Have every drawing use these LoRAs unless it says otherwise, and put them in first.

        Returns:
            What of the files did not fit.

        Raises:
            ValueError: for a weight out of bounds.
            ConvertError: for a file that cannot be used, or that is not there.
        """
        self._standing = self._opened(loras)
        self._worn = self._standing
        return _notes(self._standing)

    def choose(self, loras: Any, more: Iterable[Choice] = ()) -> Chosen:
        """The LoRAs of a drawing, opened.

        Args:
            loras: as ``read_choices`` takes them; None are the standing ones.
            more: of the prompt's own.

        Raises:
            ValueError: for a weight out of bounds.
            ConvertError: for a file that cannot be used, or that is not there.
        """
        chosen = self._standing if loras is None else self._opened(loras)
        said = "; ".join(str(replace(w.choice, name=w.lora.name)) for w in chosen)
        chosen += self._opened(more)
        told = {worn.lora.identity for worn in self._standing}
        return Chosen(chosen, said, _notes(w for w in chosen if w.lora.identity not in told))

    def wear(self, chosen: Chosen) -> set[str]:
        """From now on ``fold`` puts in these.

        Returns:
            The networks that carry others still, and must be read again.
        """
        before, self._worn = self._worn, chosen.worn
        parts = {part for worn in (*before, *self._worn) for part in changed_parts(worn.lora)}
        return {part for part in parts if _keys(before, part) != _keys(self._worn, part)}

    def _opened(self, loras: Any) -> tuple[Worn, ...]:
        return tuple(Worn(self._open_lora(choice.name), choice) for choice in read_choices(loras))

    # Words ----------------------------------------------------------------------------------

    @property
    def words(self) -> tuple[Word, ...]:
        """Those of the drawing."""
        return self._words

    def words_for(
        self,
        texts: Iterable[str],
        encode: Encode,
        vocab_size: int,
        notes: list[str],
        more: Sequence[Word] = (),
    ) -> tuple[dict[tuple[int, ...], range], bool]:
        """Which words stand in some texts, and the ids that they get.

        Args:
            texts: of a drawing.
            encode: the model's tokenizer.
            vocab_size: V of the text encoders.
            notes: gets a line for each word on the shelf that this model cannot use.
            more: words that are there beside the model's own and those of its LoRAs.

        Returns:
            Ids that spell a name to ids of its vectors, and whether the text encoders have other
            words still: ``set_words`` gives them these.
        """
        written = [encode(text) for text in texts]
        names: dict[tuple[int, ...], Word] = {}
        lora_words = [word for worn in self._worn for word in worn.lora.words]
        for word in (*self._own_words, *lora_words, *more):
            ids = tuple(encode(word.name))
            if any(spelled(text, ids) for text in written):
                names.setdefault(ids, word)
        for name, open_word in self._shelf().items():
            ids = tuple(encode(name))
            if ids not in names and any(spelled(text, ids) for text in written):
                try:
                    names[ids] = open_word()
                except Exception as error:  # whatever lies in the folder: the text can be read
                    if not hasattr(error, "exit_code"):
                        raise
                    notes.append(f"read as plain text: {error}")
        words = tuple(dict.fromkeys(names.values()))
        is_new, self._words = words != self._words, words
        ranges = dict(zip(words, ids_of(words, vocab_size), strict=True))
        return {ids: ranges[word] for ids, word in names.items()}, is_new

    # Networks -------------------------------------------------------------------------------

    def set_words(self, network: Any, part: str) -> None:
        """Have a text encoder know the words of the drawing."""
        set_words(network, part, self._words)

    def fold(self, network: nn.Module, part: str) -> None:
        """Put into a network that was just read whatever the drawing has on top of it."""
        fold(network, part, [(worn.lora, worn.choice) for worn in self._worn])
        if part in self._text_encoders and self._words:
            self.set_words(network, part)


def _keys(worn: Sequence[Worn], part: str) -> list[object]:
    """What a network's weights depend on."""
    return [
        (each.lora.identity, each.choice.strength(part))
        for each in worn
        if each.lora.updates.get(part) and each.choice.strength(part)
    ]


def _notes(worn: Iterable[Worn]) -> list[str]:
    return list(dict.fromkeys(note for each in worn for note in each.lora.notes))
