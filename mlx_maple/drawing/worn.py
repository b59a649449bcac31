"""What a drawing's models carry beside their own weights: its LoRAs, and the learned words it uses.

A refiner carries what changes networks that it has in the same form. SDXL's has the second text
encoder in common with SDXL, and neither the first nor the UNet.
"""

from mlx_maple.adapters import Chosen, Word
from mlx_maple.drawing.arguments import texts_of
from mlx_maple.drawing.jobs import Job
from mlx_maple.drawing.model import DiffusionModel


def put_on(sd: DiffusionModel, job: Job, notes: list[str]) -> None:
    """Have all that draws carry the drawing's LoRAs and know the learned words of its texts."""
    for model in _models(sd, job):
        model.worn_by = job
    words: list[Word] = []
    if sd.adapters is not None and job.loras is not None:
        _wear(sd, job, job.loras, [], notes)
        words = list(sd.adapters.words)
    refiner = job.refiner
    if refiner is None or refiner is sd or refiner.adapters is None:
        return
    shared = {
        part
        for part, config in refiner.configs.items()
        if sd.configs.get(part) == config and refiner.networks.can_load(part)
    }
    own = refiner.adapters.choose(None)
    if job.loras is not None:
        own = own._replace(worn=own.worn + job.loras.within(shared).worn)
        for each in job.loras.worn:
            if left := [part for part in each.changes if part in {*refiner.configs} - shared]:
                what = " and ".join(left)
                name = each.lora.name
                notes.append(f"the LoRA {name} leaves the refiner's {what} as it is, another one")
    encoders = set(refiner.text_encoders.tokenizers)
    known = [word.within(encoders) for word in words if encoders <= shared & word.vectors.keys()]
    _wear(refiner, job, own, known, notes)
    for word in words:
        if word.name not in {each.name for each in refiner.adapters.words}:
            notes.append(f"the word {word.name} is plain text to the refiner")


def is_on(sd: DiffusionModel, job: Job) -> bool:
    """Whether what this drawing put on is what is worn: another may have had its turn since."""
    return all(model.worn_by is job for model in _models(sd, job))


def _models(sd: DiffusionModel, job: Job) -> list[DiffusionModel]:
    return [sd] if job.refiner is None else [sd, job.refiner]


def _wear(
    model: DiffusionModel, job: Job, loras: Chosen, words: list[Word], notes: list[str]
) -> None:
    """Have one model carry LoRAs, and know its own words in the texts and these."""
    assert model.adapters is not None
    model.networks.drop(*model.adapters.wear(loras))
    encoders = model.text_encoders.tokenizers
    rows = min(model.configs[part].vocab_size for part in encoders)
    model.text_encoders.words, are_new = model.adapters.words_for(
        texts_of(job.prompts), model.tokenizer.encode, rows, notes, more=words
    )
    if are_new:
        for part in encoders:
            model.adapters.set_words(model.networks[part], part)
