"""The tests. What is set here stands before any library is imported."""

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars among what commands print
