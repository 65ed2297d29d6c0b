"""How pairs are computed fast: tiles, gathers, merges. Nothing here knows the name of a mechanism."""
