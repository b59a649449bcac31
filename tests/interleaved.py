"""Drawings of one model that go on step by step, one after the other."""


def in_turn(*drawings):
    """The results of generators of drawings, each of which takes a step in its turn."""
    results = [None] * len(drawings)
    while any(result is None for result in results):
        for i, drawing in enumerate(drawings):
            if (progress := next(drawing, None)) is not None:
                results[i] = progress.result
    return results
