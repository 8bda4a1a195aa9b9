"""What `turboquant doctor` prints."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_report", "ranges"]


def print_report(console: Console, found: dict[str, Any]) -> None:
    """Print what `run_doctor` returned, a line for each fact."""

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    say(f"{found['model']}: {found['architecture']}, seen by {found['seen_by']}")
    for package in found["packages"]:
        version = package["version"] or "not installed"
        say(f"{package['name']}: {version}" + ("" if package["fits"] else f"; EXPECTED {package['expected']}"))
    device = found["device"]
    say(f"{device['device']}: {device['name']}" + (f", driver {device['driver']}" if device.get("driver") else ""))
    say(f"native kernels: {device['native'] or 'run'}")
    for group in found["layers"]:
        window = f"windows of {group['window']}" if group["window"] else "full attention"
        heads = f"{group['num_heads']} query heads over {group['num_kv_heads']} of {group['head_dim']}"
        say(f"layers {ranges(group['numbers'])}: {window}, {heads}")
        for name, title in (("transformers", "transformers"), ("vllm", "vLLM")):
            say(f"  {title}: {_fate(group[name], not device['native'])}")
    for what, numbers in found["others"].items():
        say(f"layers {ranges(numbers)}: {what}, kept as the model has it")
    if found["refused"]:
        say(f'attn_implementation="tq4" refuses this model: {found["refused"]}')
    if found["vllm"]:
        say(f"vLLM: not served: {found['vllm']}")
    size = found["bytes_per_token"]
    if size["bf16"]:
        say(f"bytes a token: {size['tq4']:,.0f}; in bf16 {size['bf16']:,.0f}, {size['bf16'] / size['tq4']:.2f} times as many")
    say(f"key scales: {found['key_scales']}")
    say("served in 4 bits" if found["served"] else "NOT served in 4 bits")


def ranges(numbers: Sequence[int]) -> str:
    """Numbers in ascending order, neighbours as from-to: ``0-3, 5``; equal steps as ``0-10 by 2``."""
    if len(numbers) > 2 and len({b - a for a, b in itertools.pairwise(numbers)}) == 1:
        step = numbers[1] - numbers[0]
        return f"{numbers[0]}-{numbers[-1]}" + (f" by {step}" if step > 1 else "")
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in found)


def _fate(group: dict[str, Any], has_native: bool) -> str:
    if group["bits"] != 4:
        return f"dense: {group['why']}"
    said = f"4 bits; decoded by {group['decode']}, stored by {group['store']}"
    said += f" ({group['not_native']})" if group["not_native"] and has_native else ""
    return said + (f"; {group['note']}" if group.get("note") else "")
