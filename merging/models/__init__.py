"""Models as they come: checkpoints, hub, adapters, vocabularies, tokenizers, and the flat vector over them."""
