"""What /proc and /sys hold on some boards: the files that a profile reads, with values as these boards print them."""

from __future__ import annotations

from pathlib import Path

_PI_CPU = """processor\t: {number}
BogoMIPS\t: 108.00
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: {part}
CPU revision\t: 3

"""

_MEMINFO = """MemTotal:       {total:8} kB
MemFree:          123456 kB
MemAvailable:   {available:8} kB
Cached:           234567 kB
SwapTotal:      {swap:8} kB
SwapFree:       {swap_free:8} kB
HugePages_Total:       0
"""

# 1 GB of memory, an old kernel's file, too weak a power supply now and earlier.
PI_4 = {
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    "proc/cpuinfo": "".join(_PI_CPU.format(number=number, part="0xd08") for number in range(4))
    + "Hardware\t: BCM2835\nRevision\t: a03114\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4\n",
    "proc/meminfo": _MEMINFO.format(total=948304, available=612340, swap=102396, swap_free=99324),
    "proc/self/cgroup": "0::/user.slice/user-1000.slice/session-3.scope\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "61342\n",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
    "sys/class/hwmon/hwmon1/name": "rpi_volt\n",
    "sys/class/hwmon/hwmon1/in0_lcrit_alarm": "1\n",
}

# The file is gone: the firmware answers vcgencmd, and the kernel has the under-voltage alarm.
PI_5 = {
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "proc/cpuinfo": "".join(_PI_CPU.format(number=number, part="0xd0b") for number in range(4)),
    "proc/meminfo": _MEMINFO.format(total=8256672, available=7011904, swap=524272, swap_free=524272),
    "proc/self/cgroup": "0::/system.slice/sfl.service\n",
    "sys/fs/cgroup/system.slice/memory.max": "max\n",
    "sys/fs/cgroup/system.slice/sfl.service/memory.max": "536870912\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "47400\n",
    "sys/class/hwmon/hwmon2/name": "rp1_adc\n",
    "sys/class/hwmon/hwmon2/in1_input": "1468\n",
    "sys/class/hwmon/hwmon4/name": "rpi_volt\n",
    "sys/class/hwmon/hwmon4/in0_lcrit_alarm": "0\n",
}

_INA = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
ORIN_NANO = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "proc/cpuinfo": "".join(_PI_CPU.format(number=number, part="0xd42") for number in range(6)),
    "proc/meminfo": _MEMINFO.format(total=7802680, available=5123456, swap=3901328, swap_free=3900000),
    "proc/self/cgroup": "0::/docker/0123456789ab\n",
    "sys/fs/cgroup/memory.max": "1073741824\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "52187\n",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "51031\n",
    "sys/class/thermal/thermal_zone2/type": "cv0-thermal\n",  # off: its temperature cannot be read
    "sys/class/thermal/thermal_zone8/type": "tj-thermal\n",
    "sys/class/thermal/thermal_zone8/temp": "52187\n",
    "sys/kernel/debug/nvmap/iovmm/clients": """CLIENT                        PROCESS      PID        SIZE
user                      gnome-shell     2831       5384K
user                          python3     4481     118372K
user                             Xorg     1731      18140K
total                                              141896K
""",
    **{
        f"{_INA}/{name}": f"{value}\n"
        for name, value in {
            "name": "ina3221",
            "in1_label": "VDD_IN",
            "in1_input": 4984,
            "curr1_input": 1856,
            "in2_label": "VDD_CPU_GPU_CV",
            "in2_input": 4976,
            "curr2_input": 640,
            "in3_label": "VDD_SOC",
            "in3_input": 4976,
            "curr3_input": 344,
            "in4_input": 9280,
            "in5_input": 3200,
            "in6_input": 1720,
            "in7_label": "sum of shunt voltages",
            "in7_input": 14200,
        }.items()
    },
    "var/lib/nvpmodel/status": "pmode:0001\n",
    "etc/nvpmodel.conf": """# the modes
< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_0 /sys/devices/system/cpu/cpu0/online
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=7W >
CPU_ONLINE CORE_0 1
< PM_CONFIG DEFAULT=0 >
""",
}

_RAPL = "sys/class/powercap/intel-rapl"
X86 = {
    "sys/class/dmi/id/sys_vendor": "LENOVO\n",
    "sys/class/dmi/id/product_name": "20XW004AGE\n",
    "proc/cpuinfo": "".join(
        f"processor\t: {number}\nvendor_id\t: GenuineIntel\nmodel name\t: 11th Gen Intel(R) Core(TM) i7-1165G7 @ 2.80GHz\n\n"
        for number in range(8)
    ),
    "proc/meminfo": _MEMINFO.format(total=16124520, available=9123456, swap=0, swap_free=0),
    "proc/self/cgroup": "12:memory:/user.slice\n5:cpu,cpuacct:/user.slice\n0::/user.slice/session-2.scope\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/user.slice/memory.limit_in_bytes": "2147483648\n",
    "sys/class/thermal/thermal_zone0/type": "acpitz\n",
    "sys/class/thermal/thermal_zone0/temp": "25000\n",
    "sys/class/thermal/thermal_zone1/type": "x86_pkg_temp\n",
    "sys/class/thermal/thermal_zone1/temp": "58000\n",
    f"{_RAPL}:0/name": "package-0\n",
    f"{_RAPL}:0/energy_uj": "262143000000\n",
    f"{_RAPL}:0/max_energy_range_uj": "262143328850\n",
    f"{_RAPL}:0:0/name": "core\n",
    f"{_RAPL}:0:0/energy_uj": "1234\n",
    f"{_RAPL}:1/name": "psys\n",
    f"{_RAPL}:1/energy_uj": "999\n",
}


def plant(root: Path, tree: dict[str, str]) -> Path:
    """Write the tree below `root`; returns it."""
    for name, text in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root
