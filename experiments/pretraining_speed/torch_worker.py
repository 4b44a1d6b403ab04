"""The other side: the same model, trained by PyTorch as its own users would write it. Runs without dsjax."""

import contextlib
import os
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from protocol import Job, commands
from side_by_side import serve
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

INIT_STD = 0.02


class Block(nn.Module):
    """Pre-LayerNorm attention and MLP."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.c_attn, self.attn_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.c_fc, self.mlp_proj = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, dim = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).view(rows, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(mixed.transpose(1, 2).reshape(rows, length, dim))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Tokens and targets [B, T] -> mean cross-entropy."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.remat = job.remat == "full"
        self.wte = nn.Embedding(job.vocab_size, job.model_dim)
        self.wpe = nn.Embedding(job.length, job.model_dim)
        self.h = nn.ModuleList(Block(job.model_dim, job.num_heads) for _ in range(job.num_layers))
        self.ln_f = nn.LayerNorm(job.model_dim)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe.weight
        for block in self.h:
            x = checkpoint(block, x, use_reentrant=False) if self.remat else block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def set_weights(model: GPT, job: Job) -> None:
    """GPT-2's names; its matrices are [in, out], torch's Linear has [out, in]. Without a file: GPT-2's initial ones."""
    if not job.weights:
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                scale = (2 * job.num_layers) ** -0.5 if name.endswith("proj.weight") else 1.0
                nn.init.normal_(parameter, std=INIT_STD * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        return
    ours = {"attn.c_attn": "c_attn", "attn.c_proj": "attn_proj", "mlp.c_fc": "c_fc", "mlp.c_proj": "mlp_proj"}
    state = {}
    with np.load(f"{job.weights}/weights.npz") as file:
        for name in file.files:
            value = torch.from_numpy(file[name])
            for theirs, short in ours.items():
                if theirs in name:
                    name, value = name.replace(theirs, short), value.T if value.dim() == 2 else value
            state[name] = value.clone()
    model.load_state_dict(state)


class TorchTrainer:
    """Eager, or compiled where the job says so."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))))
        self.job, self.device = job, torch.device(job.device)
        batches = torch.from_numpy(np.load(job.tokens).astype(np.int64)).to(self.device)
        self.batches = [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in batches]
        torch.manual_seed(0)
        self.model = GPT(job).to(self.device)
        self.step_model = torch.compile(self.model) if job.compile else self.model
        self.form_seconds: dict[str, float] = {}
        self.form = "fused" if job.device == "cuda" else self._fastest_form()
        self.reset()

    def _fastest_form(self) -> str:
        """The implementation of AdamW that takes the shortest step here."""
        for form in ("fused", "foreach", "for-loop"):
            self.form = form
            self.reset()
            self.train(2)
            seconds = []
            for _ in range(5):
                began = time.perf_counter()
                self.train(1)
                seconds.append(time.perf_counter() - began)
            self.form_seconds[form] = statistics.median(seconds)
        return min(self.form_seconds, key=lambda form: self.form_seconds[form])

    def reset(self) -> None:
        set_weights(self.model, self.job)
        settings = self.job.optimizer
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
            lr=settings["learning_rate"],
            betas=(settings["b1"], settings["b2"]),
            eps=settings["eps"],
            fused=self.form == "fused",
            foreach=self.form == "foreach",
        )
        self.at = 0

    def train(self, steps: int) -> list[float]:
        cuda, mixed = self.device.type == "cuda", self.job.compute_dtype == "bfloat16"
        losses = []
        with contextlib.ExitStack() as stack:
            if cuda:  # flash or an error: nothing slower in silence
                stack.enter_context(sdpa_kernel(SDPBackend.FLASH_ATTENTION))
            for _ in range(steps):
                tokens, targets = self.batches[self.at % len(self.batches)]
                self.at += 1
                with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
                    loss = self.step_model(tokens, targets)
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                losses.append(loss.detach())
            if cuda:
                torch.cuda.synchronize()
        return [float(loss) for loss in losses]

    def about(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "threads": torch.get_num_threads(),
            "optimizer": f"AdamW, {self.form}",
            "seconds_by_optimizer_form": self.form_seconds,
        }

    def inspect(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        return {"peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0}


if __name__ == "__main__":
    serve(lambda **job: commands(TorchTrainer(Job(**job))))
