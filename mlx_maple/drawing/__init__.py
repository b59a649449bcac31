"""What a drawing is made of: the model, the checked arguments, and the work, phase by phase.

``mlx_maple/pipeline.py`` is the way in. Each of these modules imports only from those above it:

- ``results``: what is known of a model, how far a drawing is, and what it ends with
- ``clock``: seconds by part of the work
- ``model``: a model's networks, made ready for the device
- ``jobs``: one call's arguments, checked and complete
- ``arguments``: how each is checked
- ``starts``: starting noise, the steps' noise, and the picture outside a mask
- ``autoencode``, ``previews``: pictures to latents and back
- ``worn``: LoRAs and learned words on what draws
- ``denoise``: what the sampler asks of the UNet, and its steps
- ``phases``: a drawing from text to pictures
"""
