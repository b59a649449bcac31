"""What people put on top of a model: LoRAs change its weights, textual inversions its vocabulary.

``Adapters`` says which of them a model draws with, and puts them into its networks.
"""

from mlx_maple.adapters.adapters import Adapters, Chosen
from mlx_maple.adapters.lora import Choice, Lora, read_choice, read_choices
from mlx_maple.adapters.textual_inversion import Word

__all__ = ["Adapters", "Choice", "Chosen", "Lora", "Word", "read_choice", "read_choices"]
