"""The same computed by software that nobody here wrote: Hugging Face's Llama, diffusers' schedulers.

  pip install '.[external]'
  python -m tests.external.write_references        writes tests/testdata/external_references.npz anew

All in float32 on the CPU. torch and what stands on it are imported where they are used: the tests import
this file without them.
"""

import os
from importlib.metadata import version
from unittest import mock

import numpy as np

from tests.external import inputs

VERSIONS = ("torch", "transformers", "diffusers", "numpy")


def llama_state() -> dict:
    """The weights under Hugging Face's names, (out, in), without the padding of the vocabulary."""
    w = inputs.weights()
    out = {"model.embed_tokens.weight": w["token_embedding"][: inputs.V],
           "model.norm.weight": w["decoder/final_norm_scale"],
           "lm_head.weight": w["lm_head_kernel"].T[: inputs.V]}
    names = {"attention_norm_scale": "input_layernorm", "attention/wq_kernel": "self_attn.q_proj",
             "attention/wk_kernel": "self_attn.k_proj", "attention/wv_kernel": "self_attn.v_proj",
             "attention/wo_kernel": "self_attn.o_proj", "mlp_norm_scale": "post_attention_layernorm",
             "mlp/gate_kernel": "mlp.gate_proj", "mlp/up_kernel": "mlp.up_proj",
             "mlp/down_kernel": "mlp.down_proj"}
    for ours, theirs in names.items():
        for layer, x in enumerate(w[f"decoder/blocks/{ours}"]):
            out[f"model.layers.{layer}.{theirs}.weight"] = x.T
    return out


def llama_logits() -> list[list[np.ndarray]]:
    """Logits (n, V) of each document by `LlamaForCausalLM`, given alone."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=inputs.V, hidden_size=inputs.D, intermediate_size=inputs.F,
        num_hidden_layers=inputs.L, num_attention_heads=inputs.H, num_key_value_heads=inputs.K,
        max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}))
    state = {name: torch.tensor(x) for name, x in llama_state().items()}
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        return [[model(torch.tensor(ids[None]).long()).logits[0].numpy() for ids in row]
                for row in inputs.documents()]


def scheduler(name: str, variance: str | None, prediction: str, steps: int, alphas):
    """DDPMScheduler or DDIMScheduler on alphabar(n / 1000) = alphas[n - 1], on the grid of `steps` steps."""
    import diffusers
    import torch

    before = np.concatenate([[1.0], np.float64(alphas[:-1])])
    kind, own = {"ddpm": (diffusers.DDPMScheduler, {"variance_type": variance}),
                 "ddim": (diffusers.DDIMScheduler, {})}[name]
    made = kind(num_train_timesteps=inputs.NUM_TIMESTEPS, trained_betas=1 - alphas / before,
                prediction_type=inputs.PREDICTIONS[prediction], timestep_spacing="trailing",
                clip_sample=False, **own)
    # They multiply 1 - beta up again in float32, a little off: the very alphas, so that the steps are compared.
    np.testing.assert_allclose(made.alphas_cumprod, alphas, rtol=1e-4)
    made.alphas_cumprod = torch.tensor(alphas)
    made.set_timesteps(steps)
    return made


def scheduler_steps(case, alphas):
    """(timesteps (steps,), x_s (steps, VALUES)) of every step, each from its own x_t (inputs.step_inputs)."""
    import torch

    made, out = scheduler(*case, alphas), []
    for t, x_t, network, z in zip(made.timesteps, *map(torch.tensor, inputs.step_inputs(case[-1]))):
        with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, z=z, **__: z):
            out.append(made.step(network[None], t, x_t[None]).prev_sample[0].numpy())
    return made.timesteps.numpy(), np.stack(out)


def references(alphas) -> dict[str, np.ndarray]:
    """Everything that the file holds."""
    out = {"made_with": np.array([f"{name} {version(name)}" for name in VERSIONS]), "alphas": alphas}
    for row, documents in enumerate(llama_logits()):
        out |= {f"logits_{row}_{i}": x for i, x in enumerate(documents)}
    for case in inputs.CASES:
        out[f"timesteps_{case[-1]}"], out[inputs.case_name(*case)] = scheduler_steps(case, alphas)
    return out


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from tfusion.diffusion.schedule import alpha_bar

    n = np.arange(1, inputs.NUM_TIMESTEPS + 1)
    made = references(np.asarray(alpha_bar(n / inputs.NUM_TIMESTEPS)))
    np.savez_compressed(inputs.REFERENCES, **made)
    print(f"{inputs.REFERENCES}: {inputs.REFERENCES.stat().st_size} bytes, {', '.join(made['made_with'])}")


if __name__ == "__main__":
    main()
