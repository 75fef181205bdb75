"""What a run uses of its machine between two looks, under the names that MLflow's page of system metrics knows."""

import psutil
import torch

MB = 1e6


class Usage:
    """Looks at the machine of this process, at the ends of epochs alone: no thread, nothing on steps that do not log.

    Args:
        device: of the run; on a GPU its memory is looked at too.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        psutil.cpu_percent()  # the first call begins the span that the next one is about
        self._counts = _counts()

    def metrics(self) -> dict[str, float]:
        """Mean CPU use in percent of all cores and traffic in MB since the last look; memory in MB as it is now."""
        memory, before, self._counts = psutil.virtual_memory(), self._counts, _counts()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MB,
            "system_memory_usage_percentage": memory.percent,
            "process_memory_megabytes": psutil.Process().memory_info().rss / MB,
            **{name: (now - before[name]) / MB for name, now in self._counts.items() if name in before},
        }
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            found["gpu_0_memory_usage_megabytes"] = (total - free) / MB
            found["gpu_0_memory_usage_percentage"] = 100 * (total - free) / total
        return {f"system/{name}": value for name, value in found.items()}


def _counts() -> dict[str, int]:
    """Bytes since the machine started; a container may hide its disks."""
    network, disk = psutil.net_io_counters(), psutil.disk_io_counters()
    counts = {"network_receive_megabytes": network.bytes_recv, "network_transmit_megabytes": network.bytes_sent}
    if disk is not None:
        counts |= {"disk_read_megabytes": disk.read_bytes, "disk_write_megabytes": disk.write_bytes}
    return counts
