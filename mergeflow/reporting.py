"""A plan as a person or a program reads it: text, JSON, and a picture of the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mergeflow.checkpoint.adapter import Adapter
from mergeflow.errors import printable
from mergeflow.graph import Apply, Expression, Load, Plan, loads_of
from mergeflow.planning import applications, loads
from mergeflow.publishing import cell_text
from mergeflow.recipe import Node, Recipe
from mergeflow.settings import Each, Gradient

BYTES_A_SECOND = 1.0e9
"""What one thread is taken to do with stored bytes where nothing was measured yet: for the estimate of time."""


def plan_data(plan: Plan, *, device: str, threads: int, peak: int, free: int) -> dict[str, Any]:
    """A plan as JSON-ready data. `peak` and `free` are bytes of memory and of disk."""
    read = bytes_read(plan)
    return {
        "name": plan.name,
        "digest": plan.digest,
        "recipe": plan.recipe,
        "models": {
            name: {
                "source": checkpoint.folder.label,
                "revision": checkpoint.folder.revision,
                "files": len(checkpoint.files),
                "tensors": len(checkpoint.tensors),
                "bytes": sum(tensor.nbytes for tensor in checkpoint.tensors.values()),
                "adapter": checkpoint.facts if isinstance(checkpoint, Adapter) else None,
            }
            for name, checkpoint in plan.models.items()
        },
        "stages": [asdict(stage) for stage in plan.stages],
        "rows": [
            {
                "output": row.output,
                "name": row.name,
                "dtype": row.dtype.name,
                "shape": list(row.shape),
                "file": plan.shards[row.shard].file,
                "expression": expression_text(row.expression),
            }
            for row in plan.rows
        ],
        "files": [
            *({"output": s.output, "file": s.file, "bytes": s.size} for s in plan.shards),
            *({"output": s.output, "file": s.file} for s in plan.side_files),
        ],
        "bytes_in": plan.bytes_in,
        "bytes_read": read,
        "bytes_out": plan.bytes_out,
        "bytes_free": free,
        "peak_memory": peak,
        "device": device,
        "threads": threads,
        "estimated_seconds": round((read + plan.bytes_out) / BYTES_A_SECOND / max(threads, 1), 1),
        "warnings": list(plan.warnings),
        "notes": list(plan.notes),
    }


def bytes_read(plan: Plan) -> int:
    """Bytes that a run reads: each tensor once, and twice more what a measure looks at (rounds depend on the numbers)."""
    measures = (one.measure for one in applications(row.expression for row in plan.rows))
    once = {id(measure): measure for measure in measures if measure is not None}
    measured = (inputs for measure in once.values() for inputs in measure.over)
    return plan.bytes_in + 2 * sum(load.tensor.nbytes for inputs in measured for load in loads(*inputs))


def expression_text(expression: Expression) -> str:
    """An expression as text: `ties(base, task_vector(base, a))`."""
    if isinstance(expression, Apply):
        return f"{expression.op.name}({', '.join(expression_text(one) for one in expression.inputs)})"
    names = [f"{load.model}:{load.tensor.name}" for load in loads_of(expression)]
    if isinstance(expression, Load):
        return names[0]
    return f"{type(expression.source).__name__.lower()}({', '.join(names)})"


def plan_text(data: Mapping[str, Any], out: Path) -> str:
    """A plan for a person."""
    lines = [f"{data['name']}  ->  {out}", ""]
    lines += [
        f"  reads    {name:<16} {size_text(m['bytes']):>9}  {m['tensors']} tensors in {m['files']} file{'s' * (m['files'] != 1)}"
        f"  {m['source']}{_adapter_text(m['adapter'])}"
        for name, m in data["models"].items()
    ]
    lines += [""] * bool(data["stages"])
    lines += [
        f"  {'in cache' if stage['done'] else 'runs':<8} {stage['node']:<16} {stage['op']} of {stage['model']}"
        f"{' on ' + stage['data'] if stage['data'] else ''}  {stage['key'][:12]}{_needs_text(stage['needs'])}"
        for stage in data["stages"]
    ]
    kinds: dict[str, list[str]] = {}
    for row in data["rows"]:
        kinds.setdefault(row["expression"].split("(")[0] if "(" in row["expression"] else "as it is", []).append(
            row["name"]
        )
    lines += ["", f"  makes    {len(data['rows'])} tensors"]
    lines += [f"           {len(names):>6}  {kind}" for kind, names in kinds.items()]
    lines += ["", "  writes"]
    lines += [
        f"           {size_text(f['bytes']) if 'bytes' in f else '':>9}  {f['output'] + '/' if f['output'] else ''}{f['file']}"
        for f in data["files"]
    ]
    lines += [
        "",
        f"  bytes    {size_text(data['bytes_read'])} read, {size_text(data['bytes_out'])} written, "
        f"{size_text(data['bytes_free'])} free on the disk",
        f"  memory   {size_text(data['peak_memory'])} at most, {data['threads']} threads, on {data['device']}",
        f"  time     about {data['estimated_seconds']:g} s",
        f"  digest   {data['digest']}",
    ]
    lines += [f"  note     {note}" for note in data["notes"]]
    lines += [f"  warning  {warning}" for warning in data["warnings"]]
    return printable("\n".join(lines))


def _needs_text(needs: Mapping[str, Any] | None) -> str:
    """What making a stage takes, as words; empty where that is not known."""
    if needs is None:
        return ""
    of = "" if needs["rows"] is None else f" for {needs['rows']:,} rows of about {needs['tokens']:,} tokens in all"
    return (
        f"\n{'':<27} about {needs['seconds']:g} s{of}, {size_text(needs['disk'])} of disk, "
        f"{size_text(needs['memory'])} of memory beside activations"
    )


def plan_markdown(data: Mapping[str, Any]) -> str:
    """A plan for a CI's summary or a comment on a pull request: what it reads, runs and makes, and what is wrong with it."""
    lines = [
        f"### Plan of {markdown_cell(data['name'])}",
        "",
        f"{len(data['rows'])} tensors: {size_text(data['bytes_read'])} read, {size_text(data['bytes_out'])} written, "
        f"{size_text(data['peak_memory'])} of memory at most",
        "",
        "| reads | size | from |",
        "| --- | ---: | --- |",
    ]
    for name, model in data["models"].items():
        source = f"{model['source']}@{model['revision']}" if model["revision"] else model["source"]
        lines.append(f"| `{markdown_cell(name)}` | {size_text(model['bytes'])} | `{markdown_cell(source)}` |")
    for stage in data["stages"]:
        on = f" on `{markdown_cell(stage['data'])}`" if stage["data"] else ""
        done = "in the cache" if stage["done"] else "runs"
        lines.append(
            f"| `{markdown_cell(stage['node'])}` | {done} | `{stage['op']}` of `{markdown_cell(stage['model'])}`{on} |"
        )
    lines += [""] * bool(data["warnings"] or data["notes"])
    lines += [f"- ⚠️ {markdown_cell(warning)}" for warning in data["warnings"]]
    lines += [f"- {markdown_cell(note)}" for note in data["notes"]]
    return "\n".join(lines) + "\n\n"


def markdown_cell(text: str) -> str:
    """Text that can stand in a cell of a table, in code style or not: it ends neither and starts no line of its own."""
    return cell_text(text).replace("<", "&lt;")


def _adapter_text(facts: Mapping[str, Any] | None) -> str:
    """What an adapter is, after its source."""
    if facts is None:
        return ""
    ranks = "-".join(str(one) for one in dict.fromkeys((facts["rank"] or [0])[:1] + facts["rank"][-1:]))
    whole = f" and {len(facts['saved'])} whole weights" if facts["saved"] else ""
    return f" (adapter: rank {ranks} on {', '.join(facts['targets'])}{whole})"


def size_text(count: float) -> str:
    """Bytes with a unit that fits: 2.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def mermaid(recipe: Recipe) -> str:
    """The recipe's graph in mermaid's words: models, data, nodes and outputs, with an op's settings on its node."""
    ids = {name: f"n{index}" for index, name in enumerate([*recipe.models, *recipe.artifacts, *recipe.nodes])}
    data_ids = {name: f"d{index}" for index, name in enumerate(recipe.data)}
    lines = ["graph LR"]
    sources = {name: one.location for name, one in recipe.models.items()}
    sources |= {name: one.location for name, one in recipe.artifacts.items()}
    for name, path in sources.items():
        lines.append(f'  {ids[name]}[("{_label(name, path)}")]')
    for name, source in recipe.data.items():
        lines.append(f'  {data_ids[name]}[/"{_label(name, source.path)}"/]')
    for name, node in recipe.nodes.items():
        lines.append(f'  {ids[name]}["{_label(name, node.op.name, *_settings(node))}"]')
    for name, node in recipe.nodes.items():
        for index, one in enumerate(node.inputs):
            rule = node.rules[index] if node.rules else None
            words = f'|"{_label(", ".join(rule))}"|' if rule else ""
            if node.takes:
                first, last = node.takes[index]
                words = f'|"{first if first == last else f"{first}-{last}"}"|'
            lines.append(f"  {ids[one.model]} -->{words} {ids[name]}")
            lines += [f"  {ids[other]} -. {word} .-> {ids[name]}" for word, other in one.keys.items()]
            if one.data:
                lines.append(f"  {data_ids[one.data]} -. data .-> {ids[name]}")
        for word, other in (("base", node.base), ("others", node.others), ("rest", node.rest)):
            if other:
                lines.append(f"  {ids[other]} -. {word} .-> {ids[name]}")
    for index, output in enumerate(recipe.outputs.values()):
        lines.append(f'  {ids[output.node]} --> o{index}(["{_label(output.key or recipe.name)}"])')
    return "\n".join(lines) + "\n"


def _settings(node: Node) -> list[str]:
    lines = []
    for name in type(node.op).model_fields:
        value = getattr(node.op, name)
        if value != type(node.op).model_fields[name].default:
            lines.append(f"{name} {_setting_text(value)}")
    return lines


def _setting_text(value: Any) -> str:
    if isinstance(value, Each):
        return " · ".join(map(_setting_text, value))
    if isinstance(value, Gradient):
        return f"{value.gradient[0]}..{value.gradient[-1]}"
    return "by rules" if isinstance(value, tuple) else str(value)


def _label(*lines: str) -> str:
    """Text that can stand between quotes in mermaid."""
    return "<br/>".join(
        printable(line).replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;") for line in lines
    )
