"""The line that stands over every table: date, hardware, versions."""

import datetime
import os
import platform
from pathlib import Path

import torch


def describe() -> str:
    """Return date, processor or GPU, cores and versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    today = datetime.date.today().isoformat()
    threads = torch.get_num_threads()
    return f"{today}, {device}, {os.cpu_count()} cores ({threads} threads), torch {torch.__version__}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
