"""Clients that other people wrote, unmodified: what they call must work.

Run by `make serve-check`. `openai`, and for A1111's API `webuiapi`, `sd-backend-client` and
`aaa1111`, all from PyPI, against the embedded model; each test is one of their calls.
"""

import base64
import io
import threading
import time

import openai
import pytest
import webuiapi
from live import Server
from PIL import Image
from sd_backend_client.api.a1111_webservice import A1111Webservice
from sd_backend_client.api.webui.diffusion_request_body import DiffusionRequestBody

pytestmark = pytest.mark.filterwarnings("ignore")  # of their own

LEAF = {"prompt": "a red maple leaf", "seed": 7, "steps": 3, "width": 128, "height": 128}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("clients") / "data", model=None) as running:
        yield running


@pytest.fixture(scope="module")
def a1111(server):
    return webuiapi.WebUIApi(port=server.port)


@pytest.fixture(scope="module")
def leaf(a1111):
    return a1111.txt2img(**LEAF, cfg_scale=3)


@pytest.fixture(scope="module")
def gpt(server):
    with openai.OpenAI(base_url=f"{server.base}/v1", api_key="none", max_retries=0) as client:
        yield client


# webuiapi ----------------------------------------------------------------------------------------


def test_webuiapi_txt2img(leaf):
    assert leaf.image.size == (128, 128) and leaf.info["seed"] == 7


def test_webuiapi_txt2img_batch(a1111):
    answer = a1111.txt2img(**LEAF, batch_size=2, sampler_name="DPM++ 2M", scheduler="Karras")
    assert len(answer.images) == 2 and answer.info["all_seeds"] == [7, 8]


def test_webuiapi_img2img(a1111, leaf):
    answer = a1111.img2img(images=[leaf.image], **LEAF, cfg_scale=3, denoising_strength=0.5)
    assert answer.image.size == (128, 128)


def test_webuiapi_inpaint(a1111, leaf):
    mask = Image.new("L", (128, 128))
    mask.paste(255, (32, 32, 96, 96))
    answer = a1111.img2img(images=[leaf.image], mask_image=mask, mask_blur=0, **LEAF, cfg_scale=3)
    before = leaf.image.convert("RGB").getpixel((2, 2))
    assert answer.image.convert("RGB").getpixel((2, 2)) == before


def test_webuiapi_png_info(a1111, leaf):
    assert a1111.png_info(leaf.image).info.startswith("a red maple leaf")


def test_webuiapi_extra_single_image(a1111, leaf):
    answer = a1111.extra_single_image(
        image=leaf.image, upscaler_1=webuiapi.Upscaler.Lanczos, upscaling_resize=2
    )
    assert answer.image.size == (256, 256)


def test_webuiapi_extra_batch_images(a1111, leaf):
    answer = a1111.extra_batch_images(
        images=[leaf.image] * 2, upscaler_1=webuiapi.Upscaler.Nearest, upscaling_resize=2
    )
    assert [image.size for image in answer.images] == [(256, 256)] * 2


def test_webuiapi_options(a1111):
    a1111.set_options({"sd_model_checkpoint": "demo"})
    assert a1111.get_options()["sd_model_checkpoint"] == "demo"
    a1111.util_set_model("demo")
    assert a1111.util_get_current_model() == "demo"


@pytest.mark.parametrize(
    "name",
    """get_progress get_cmd_flags get_samplers get_sd_vae get_upscalers get_latent_upscale_modes
    get_loras get_sd_models get_hypernetworks get_face_restorers get_realesrgan_models
    get_prompt_styles refresh_checkpoints get_scripts get_embeddings get_memory get_schedulers
    interrupt skip util_get_model_names util_get_sampler_names""".split(),
)
def test_webuiapi_lists(a1111, name):
    if not hasattr(a1111, name):
        pytest.skip(f"this webuiapi has no {name}")
    assert getattr(a1111, name)() is not None


def test_webuiapi_interrupt(server, a1111):
    answers = []
    values = {**LEAF, "steps": 150}
    thread = threading.Thread(target=lambda: answers.append(a1111.txt2img(**values)))
    thread.start()
    other = webuiapi.WebUIApi(port=server.port)
    while not other.get_progress()["state"]["sampling_step"]:
        time.sleep(0.05)
    other.interrupt()
    thread.join(60)
    assert answers[0].image.size == (128, 128)


def test_webuiapi_basic_authentication(tmp_path):
    with Server(tmp_path / "data", "--token", "correct-horse-battery") as server:
        stranger = webuiapi.WebUIApi(port=server.port)
        with pytest.raises(RuntimeError, match="401"):
            stranger.txt2img(**LEAF)
        known = webuiapi.WebUIApi(port=server.port, username="me", password="correct-horse-battery")
        assert known.txt2img(**LEAF).image.size == (128, 128)


# openai ------------------------------------------------------------------------------------------


def test_openai_models(gpt):
    assert "demo" in [model.id for model in gpt.models.list()]
    assert gpt.models.retrieve("demo").id == "demo"


def test_openai_generate_b64(gpt):
    answer = gpt.images.generate(prompt="a red maple leaf", size="128x128", n=2)
    pictures = [Image.open(io.BytesIO(base64.b64decode(item.b64_json))) for item in answer.data]
    assert [picture.size for picture in pictures] == [(128, 128)] * 2


def test_openai_generate_url(server, gpt):
    answer = gpt.images.generate(
        model="demo", prompt="a red maple leaf", size="128x128", response_format="url"
    )
    with server.client() as client:
        assert client.get(answer.data[0].url).headers["content-type"] == "image/png"


def test_openai_generate_stream(gpt):
    stream = gpt.images.generate(
        model="demo", prompt="a red maple leaf", size="128x128", stream=True, partial_images=2
    )
    kinds = [event.type for event in stream]
    assert kinds[-1] == "image_generation.completed"
    assert set(kinds[:-1]) <= {"image_generation.partial_image"}


def file_of(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return ("leaf.png", buffer.getvalue())


@pytest.mark.parametrize("as_list", [False, True])
def test_openai_edit(gpt, leaf, as_list):
    mask = Image.new("RGBA", (128, 128), "white")
    mask.paste((0, 0, 0, 0), (32, 32, 96, 96))
    source = file_of(leaf.image)
    answer = gpt.images.edit(
        image=[source] if as_list else source,
        mask=file_of(mask),
        prompt="a blue maple leaf",
        size="128x128",
    )
    assert len(answer.data) == 1


def test_openai_errors(server, gpt):
    with pytest.raises(openai.NotFoundError):
        gpt.images.generate(model="dall-e-3", prompt="x")
    with pytest.raises(openai.BadRequestError):
        gpt.images.generate(prompt="x", size="9x9")


def test_openai_token(tmp_path):
    token = "correct-horse-battery"
    with Server(tmp_path / "data", "--token", token) as server:
        base = f"{server.base}/v1"
        with openai.OpenAI(base_url=base, api_key="wrong", max_retries=0) as stranger:
            with pytest.raises(openai.AuthenticationError):
                stranger.models.list()
        with openai.OpenAI(base_url=base, api_key=token, max_retries=0) as known:
            answer = known.images.generate(prompt="a leaf", size="128x128", response_format="url")
        with server.client() as browser:  # the address brings its own signature
            assert browser.get(answer.data[0].url).status_code == 200


# sd-backend-client -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backend(server):
    return A1111Webservice(server.base)


@pytest.mark.parametrize(
    "name",
    """login_check get_config get_styles get_scripts get_script_info get_samplers get_upscalers
    get_latent_upscale_modes get_hypernetworks get_models get_vae get_controlnet_version
    get_controlnet_models get_controlnet_modules get_controlnet_control_types
    get_controlnet_settings get_controlnet_preprocessors get_controlnet_type_categories get_loras
    list_checkpoints list_vaes list_loras list_hypernetworks list_samplers list_schedulers
    list_upscalers list_controlnet_models get_soft_inpainting_parameters get_capabilities
    refresh_checkpoints refresh_vae refresh_loras progress_check interrupt""".split(),
)
def test_sd_backend_client_lists(backend, name):
    assert getattr(backend, name)() is not None


def test_sd_backend_client_draws(backend):
    body = DiffusionRequestBody()
    for name, value in LEAF.items():
        setattr(body, name, value)
    drawn = backend.txt2img(body)
    assert drawn["images"][0].size == (128, 128)
    mask = Image.new("L", (128, 128))
    mask.paste(255, (32, 32, 96, 96))
    for covered in (None, mask):
        again = backend.img2img(drawn["images"][0], covered, body)
        assert again["images"][0].size == (128, 128)
    assert backend.submit_txt2img(body).wait().seeds == [7]


# aaa1111 -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def typed(server):
    """A client that checks the types of every answer (beartype)."""
    from aaa1111 import AAA1111  # not above: it warns of its own types, which is an error there

    return AAA1111(port=server.port)


@pytest.mark.parametrize(
    "name",
    """cmd_flags embeddings face_restorers get_options hypernetworks interrupt latent_upscale_modes
    loras lycos memory progress prompt_styles realesrgan_models refresh_checkpoints refresh_loras
    refresh_lycos reload_checkpoint samplers script_info scripts sd_models sd_vae skip
    unload_checkpoint upscalers""".split(),
)
def test_aaa1111_lists(typed, name):
    getattr(typed, name)()


def test_aaa1111_draws(typed, leaf):
    drawn = typed.txt2img({**LEAF, "enable_hr": True, "hr_second_pass_steps": 1})
    assert drawn.images[0].size == (256, 256) and drawn.info["seed"] == 7
    mask = Image.new("L", (128, 128))
    mask.paste(255, (32, 32, 96, 96))
    for fill in range(4):
        values = {**LEAF, "init_images": [leaf.image], "mask": mask, "inpainting_fill": fill}
        assert typed.img2img(values).images[0].size == (128, 128)


def test_aaa1111_enlarges(typed, leaf):
    how = {"upscaler_1": "Lanczos", "upscaling_resize": 2}
    assert typed.extra_single_image({"image": leaf.image, **how}).image.size == (256, 256)
