"""The paper that a model card cites, and what it says about the method."""

import textwrap

PAPER = {
    "title": "On-Policy RL with Optimal Reward Baseline",
    "id": "2505.23585",
    "citation": textwrap.dedent("""\
        @article{hao2025opo,
            title        = {{On-Policy RL with Optimal Reward Baseline}},
            author       = {Yaru Hao and Li Dong and Xun Wu and Shaohan Huang and Zewen Chi and Furu Wei},
            year         = 2025,
            eprint       = {arXiv:2505.23585},
        }"""),
}

METHOD = """\
### Method

OPO, On-Policy RL with Optimal reward baseline ([Hao et al. 2025](https://arxiv.org/abs/2505.23585)): every rollout
batch gives exactly one optimizer step, and the advantage of a completion is its reward minus the weighted mean reward
of its prompt's completions; the paper weighs by length. No clipping, no KL term, no entropy bonus.
"""
