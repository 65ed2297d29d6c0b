"""Cache layers of ours: one file each, all on `_own.py`. What they are chosen by stands in `../cache.py`."""
