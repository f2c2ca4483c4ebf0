"""The first cell of every chapter: `device, dtype = course.begin()`."""

import platform
import warnings

import torch

import qlora_edu
from qlora_edu import doctor, models, plots, reference


def begin() -> tuple[torch.device, torch.dtype]:
    """Set a notebook up, and print what it runs on.

    bitsandbytes is imported with its switches set (`reference`), figures get the course's look, and the libraries'
    notes to developers about names that will change in their next version are silenced.

    Returns:
        (device, dtype): a GPU if there is one, and the dtype to compute in there.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    reference.bitsandbytes()
    plots.use_style()
    threads = torch.get_num_threads()
    if threads > 1 and doctor.product_seconds(threads) > 3 * doctor.product_seconds(1):
        torch.set_num_threads(1)  # threads that wait for a busy core cost more than they bring
        print(f"threads: 1, because {threads} are slower on this machine just now")
    threads = torch.get_num_threads()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, reason = models.pick_dtype(device)
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    )
    print(f"qlora-edu {qlora_edu.__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"device: {where}")
    print(f"dtype:  {str(dtype).removeprefix('torch.')} ({reason})")
    return device, dtype
