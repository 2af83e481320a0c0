"""The measured choice on a simulated GPU: every candidate of the recipes is launched, the least time is picked, no memory stays."""

import json
import sys

from tests.support.simulation import needs_simulated_gpu, run_simulated

# Real launches and captures of every candidate; the device has no times, so that these are made up: by name, the last fastest.
PROGRAM = """
import json, sys, torch
from mimir_fast.cli.parser import parse_args
from mimir_fast.cli.pretrain import PRETRAIN
from mimir_fast.config.resolve import resolve
from mimir_fast.tuning import decisions
from mimir_fast.tuning.candidates import Workbench, candidates_of
from mimir_fast.tuning.measuring import fastest
from mimir_fast.tuning.problems import problems_of

# There is none; and whatever a simulated GPU allocates is memory of the host, so that batches are small.
torch.backends.cuda.enable_cudnn_sdp(False)
device, launched = torch.device("cuda", 0), []
torch.cuda.init()

class Made(Workbench):
    def values(self, function, dtype=None):
        # A simulated GPU has no batched products in float64.
        return super().values(function)

    def wrong(self, candidate):
        # Nothing is computed here, and what is not true of any number is not true of all.
        super().wrong(candidate)
        return ""

    def timed(self, candidate):
        once = super().timed(candidate)
        launched.append(candidate)
        once()
        return lambda: 1.0 / len(str(candidate)) - 1e-6 * len(launched)

decisions.Workbench = Made
found = {}
for recipe in ("imagenet_vit_s", "imagenet_vit_b"):
    run = resolve(*parse_args(PRETRAIN, ["--recipe", recipe, "--no_compile", "--batch_size", "8"]))
    problems = {p: candidates_of(p, device) for p in problems_of(run)}
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    trials = dict(decisions.measure_all(problems, device, run, lambda line: None, 1e6))
    # What is cached without a use is the run's to use.
    torch.cuda.empty_cache()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before, "memory is left"
    for problem, own in trials.items():
        times = {str(t.candidate): t.seconds for t in own if t.seconds is not None}
        assert times[str(fastest(own))] <= 1.03 * min(times.values())
        found[f"{recipe} {problem}"] = {str(t.candidate): t.why for t in own}
print(json.dumps(found))
"""


@needs_simulated_gpu
def test_every_candidate_of_the_recipes_is_launched(tmp_path):
    """It found workspaces that cuBLAS keeps for every stream."""
    (tmp_path / "program.py").write_text(PROGRAM)
    found = json.loads(run_simulated([sys.executable, tmp_path / "program.py"]).splitlines()[-1])
    assert len(found) == 8
    for problem, candidates in found.items():
        ours = "triton" if " mlp " in problem else "short"
        assert candidates[ours] == "", problem
        # There is no cuDNN.
        assert [name for name, why in candidates.items() if why] == ["sdpa_cudnn"] * (ours == "short"), problem
