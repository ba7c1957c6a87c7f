"""A plan (planning/plan.py's dict) as text for people."""

GIB, GB = 2**30, 1e9


def gib(n: float) -> str:
    return f"{n / GIB:.2f}"


def row(label: str, value: str, note: str = "") -> str:
    return f"  {label:28s}{value:>12s}  {note}".rstrip()


def render(plan: dict) -> str:
    lines = [*_title(plan), "", *_memory(plan), "", *_exchange(plan), "", *_step(plan), "", *_run(plan)]
    if plan["search"]:
        lines += ["", *_search(plan)]
    return "\n".join(lines)


def _title(plan: dict) -> list[str]:
    a, mesh = plan["accelerator"], plan["mesh"]
    slices = f"{a['num_slices']} slices of " if a["num_slices"] > 1 else ""
    lines = [f"{plan['experiment']} on {a['name']}: {a['chips']} {a['chip']} chips ({slices}{a['topology']})",
             f"mesh {' x '.join(f'{axis} {n}' for axis, n in mesh.items())}, "
             f"remat {plan['remat']}, batch {plan['batch_size']} x {plan['seq_len'] or 1} in "
             f"{plan['num_microbatches']} micro-batch(es), {plan['parameters'] / 1e9:.2f} B parameters"]
    return lines + [f"note: {note}" for note in plan["notes"]]


def unit(plan: dict) -> str:
    return "chip" if plan["accelerator"]["devices"] == plan["accelerator"]["chips"] else "device"


def _memory(plan: dict) -> list[str]:
    compiler = plan["compiler"]
    lines = [f"HBM per {unit(plan)}, GiB"] + [
        row("EMA" if part["name"] == "ema" else part["name"], gib(part["bytes"]), part["source"])
        for part in plan["hbm"]]
    if compiler and compiler["fits"]:
        lines.append(row("all", gib(compiler["hbm_bytes"]),
                         f"the compiler's, as laid out; {gib(compiler['peak_bytes'])} live at once"))
    else:
        lines.append(row("all", gib(plan["memory"]["total"]), "estimate"))
    lines.append(plan["verdict"])
    return lines + ([plan["suggestion"]] if plan["suggestion"] else [])


def _exchange(plan: dict) -> list[str]:
    names = {"fsdp_gather": "fsdp: gather weights", "fsdp_scatter": "fsdp: scatter gradients",
             "data_reduce": "data: sum gradients", "tensor_reduce": "tensor: sum activations",
             "sequence_keys": "sequence: keys and values", "sequence_reduce": "sequence: sum gradients"}
    lines = [f"Received per {unit(plan)} and step, GB (from shardings)"]
    return lines + [row(names[k], f"{v / GB:.2f}") for k, v in plan["exchange"].items() if v] + (
        [] if any(plan["exchange"].values()) else [row("nothing", "0.00")])


def _step(plan: dict) -> list[str]:
    s, f = plan["step"], plan["flops"]
    lines = ["One step, seconds (ESTIMATE, not measured)"]
    for part, label in (("matmul", "matmuls"), ("hbm", "HBM traffic"), ("weights", "exchange of weights"),
                        ("tensor", "tensor-parallel exchange"), ("sequence", "context-parallel exchange"),
                        ("dcn", "between slices or hosts")):
        if s[part]:
            lines.append(row(label, f"{s[part]:.3f}"))
    lines += [row("step", f"{s['seconds']:.3f}", f"{s['tokens_per_sec']:,.0f} tokens/s, MFU {s['mfu']:.1%}"),
              row("model TFLOPs", f"{s['model_flops'] / 1e12:,.0f}",
                  ", ".join(f"{k} {v / s['model_flops']:.1%}" for k, v in f["parts"].items())),
              row("executed TFLOPs", f"{s['executed_flops'] / 1e12:,.0f}", "with what is recomputed or masked"),
              row("the paper's 6 N D", f"{f['six_n_d'] / 1e12:,.0f}", "N = all parameters"),
              f"  assumed: {plan['assumptions']}"]
    return lines


def _run(plan: dict) -> list[str]:
    r = plan["run"]
    dollars = "price unknown" if r["dollars"] is None else f"${r['dollars']:,.0f}"
    note = "" if r["dollars"] is None else (
        f"at ${plan['accelerator']['dollars_per_chip_hour']:.2f} per chip-hour (as of {plan['prices_as_of']}; "
        "edit tfusion/accelerators.py)")
    return [f"The run: {r['tokens'] / 1e9:,.1f} B tokens and patches, {r['steps']:,d} steps (ESTIMATE)"
            + ("" if plan["fits"] else ", if it did fit"),
            row("days", f"{r['days']:,.1f}"), row("chip-hours", f"{r['chip_hours']:,.0f}"),
            row("cost", dollars, note)]


def _search(plan: dict) -> list[str]:
    found = plan["search"]
    lines = [f"Best of {found['looked_at']} configurations by estimated step time"
             + (f", each compiled ({found['compiles']} more compiles)" if plan["compiler"] else ", by formula"),
             f"  {'data':>5s}{'fsdp':>6s}{'sequence':>9s}{'tensor':>7s}  {'remat':12s}{'micro':>6s}"
             f"{'step s':>9s}{'MFU':>7s}{'GiB':>8s}"]
    for c in found["best"]:
        s = c["settings"]
        lines.append(f"  {s['mesh.data']:5d}{s['mesh.fsdp']:6d}{s['mesh.sequence']:9d}{s['mesh.tensor']:7d}  "
                     f"{s.get('model.remat', '-'):12s}{s['train.num_microbatches']:6d}"
                     f"{c['seconds']:9.3f}{c['mfu']:7.1%}{gib(c['hbm_bytes']):>8s}")
    return lines if found["best"] else [*lines, "  none fits"]
