"""Set before torch and triton are imported: one thread per test process, since several run side by side on few cores;
no network; and Triton's interpreter where there is no device (triton reads the variable at its own import)."""

import glob
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not glob.glob("/dev/nvidia[0-9]*"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
