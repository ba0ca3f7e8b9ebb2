"""Optimisation: which parameter learns how, Muon, and the moving average of the weights."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments

from ..evaluation.devices import has_fast_bfloat16

# Of the polynomial a x + b x^3 + c x^5, whose repeated use drives singular values towards 1 (Jordan et al., 2024).
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly: all singular values end in about [0.7, 1.2].

    Newton-Schulz iteration with the quintic of Muon (Jordan et al., 2024).

    Args:
        matrices: (n, rows, columns), worked on together.
        steps: Of the iteration.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(torch.bfloat16 if has_fast_bfloat16(matrices.device) else torch.float32)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al., 2024) for the groups that ask for it, AdamW for the others.

    Muon's update is the orthogonalised momentum (Nesterov) of each matrix, times `lr * sqrt(max(1, rows / columns))`.
    Where weights are sharded (FSDP2), each process computes it whole and takes its part.

    Args:
        params: Groups as for AdamW. One with `parts` is Muon's: each of its weights, flattened to two dimensions, is
            `parts` matrices below each other (3 for a fused qkv projection) that are orthogonalised each on its own.
        momentum: Of Muon, in [0, 1).
        **kwargs: As for AdamW.
    """

    def __init__(self, params, momentum: float = 0.95, **kwargs):
        super().__init__(params, **kwargs)
        # A fused AdamW takes float16's gradients as they are, scaled and infinite at times: have them mended before.
        self._step_supports_amp_scaling = False
        for group in self.param_groups:
            group.setdefault("parts", None)
            group["momentum"] = momentum

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            if group["parts"] is not None:
                self._muon_step([p for p in group["params"] if p.grad is not None], group)
        super().step()
        return loss

    def _muon_step(self, parameters: list[torch.nn.Parameter], group: dict):
        by_shape = {}
        for p in parameters:
            state = self.state[p]
            if not state:
                # AdamW expects a step in every state that is loaded.
                state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
            state["step"] += 1
            state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(state["momentum"], group["momentum"])
            update = (update.full_tensor() if isinstance(update, DTensor) else update).flatten(1)
            by_shape.setdefault(update.shape, []).append((p, update))
            p.grad = None  # AdamW passes over it
        for (rows, columns), members in by_shape.items():
            parts = torch.stack([update for _, update in members]).unflatten(1, (group["parts"], -1))
            updates = orthogonalize(parts.flatten(0, 1)).reshape(len(members), rows, columns)
            scale = max(1, rows / group["parts"] / columns) ** 0.5
            for (p, _), update in zip(members, updates, strict=True):
                update = update.view(p.shape)
                if isinstance(p, DTensor):
                    update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * scale)


def matrices_in(name: str, gated: bool) -> int:
    """How many matrices of a layer a weight holds one below the other, or what LoRA adds to it.

    Queries, keys and values are three; keys and values of attention pooling two; gate and value of a gated MLP two.
    """
    layer = name.removesuffix(".weight").removesuffix(".lora_B.default").rpartition(".")[2]
    return {"qkv": 3, "kv": 2, "fc1": 2 if gated else 1}.get(layer, 1)


def parameter_groups(model: torch.nn.Module, args: TrainingArguments) -> list[dict]:
    """Parameters by algorithm, learning rate and weight decay, the trained ones only; the base rate comes first.

    With `muon_learning_rate`, weight matrices of blocks and of attention pooling, and kernels of a convolutional stem,
    are Muon's and learn at that rate; `parts` is the number of matrices that a weight holds (`matrices_in`). Muon is
    for the matrices of hidden layers, each on its own (Jordan et al., 2024), and those of the pooling lie between the
    embeddings and the classifier as those of a block do. Vectors are AdamW's, and so are tokens, the query of the
    pooling and the frequencies of rotary positions, which are no matrices that map one vector to another.

    Layer-wise decay (BEiT, Bao et al., 2022, app. H): block l of L learns at its rate times `layer_decay ** (L - l)`, l
    from 1, with the frequencies of its rotary positions; the embeddings and their norm as block 0; and what follows the
    blocks, attention pooling too, without a factor, the classifier at `head_learning_rate` if given.
    `model.no_weight_decay()` names what is not decayed.
    """
    excluded, L = model.no_weight_decay(), model.config.num_hidden_layers
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        block = 0 if ".embeddings." in name or ".embedding_norm." in name else L
        number = re.search(r"\.(?:layers|rotary_positions)\.(\d+)\.", name)
        if number:
            block = int(number[1]) + 1
        rate, parts = args.learning_rate, None
        layer = ".layers." in name or ".attention_pooling." in name
        hidden = (layer and parameter.ndim == 2) or parameter.ndim == 4
        if args.muon_learning_rate is not None and hidden:
            rate, parts = args.muon_learning_rate, matrices_in(name, model.config.use_gated_mlp)
        if name.startswith("classifier.") and args.head_learning_rate is not None:
            rate = args.head_learning_rate
        rate *= args.layer_decay ** (L - block)
        decay = 0.0 if name in excluded else args.weight_decay
        group = groups.setdefault((rate, decay, parts), {"params": [], "lr": rate, "weight_decay": decay})
        if parts is not None:
            group["parts"] = parts
        group["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: group["lr"] != args.learning_rate)


def describe_groups(groups: list[dict], name: str) -> str:
    """What learns how, in words: algorithm, rates, weight decay, tensors.

    Args:
        groups: As `parameter_groups` makes them.
        name: Of the optimizer of the groups that are not Muon's.
    """
    lines = []
    for algorithm in ("Muon", name):
        members = [group for group in groups if (group.get("parts") is not None) == (algorithm == "Muon")]
        if members:
            rates = sorted({group["lr"] for group in members})
            decayed = sorted({group["weight_decay"] for group in members} - {0.0})
            tensors = sum(len(group["params"]) for group in members)
            lines.append(
                f"{algorithm}, {rates[0]:.3g}{f' to {rates[-1]:.3g}' if len(rates) > 1 else ''}, "
                f"weight decay {decayed[0] if decayed else 0:g}, {tensors} tensors"
            )
    return "; ".join(lines)


class WeightAverage:
    """Exponential moving average of a model's trained weights (Polyak and Juditsky, 1992).

    The average after step n is `decay_n * average + (1 - decay_n) * weights`, decay_n = min(decay, (1 + n) / (10 + n)),
    so that the start is soon forgotten.

    Args:
        model: Its parameters are followed and, by `swap`, exchanged.
        decay: In (0, 1).
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._other = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int):
        """Take in the weights after step `step`, from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._other.values()), list(self._parameters.values()), 1 - decay)

    @torch.no_grad()
    def swap(self):
        """Exchange the model's weights and the average."""
        for name, p in self._parameters.items():
            trained = p.clone()
            p.copy_(self._other[name])
            self._other[name].copy_(trained)

    def trained(self) -> dict[str, torch.Tensor]:
        """The weights that are trained, by name, while the model has them."""
        return {name: p.detach() for name, p in self._parameters.items()}

    @torch.no_grad()
    def load(self, trained: Path):
        """Take the model's weights as the average, and the trained ones from a file of `trained()`."""
        weights = load_file(trained)
        for name, p in self._parameters.items():
            self._other[name].copy_(p)
            p.copy_(weights[name])
