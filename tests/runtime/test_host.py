"""One process that plays simulated clients."""

import pytest

from fedlora.runtime.host import Host
from fedlora.runtime.prepare import prepare


@pytest.mark.parametrize(
    ("changes", "alone"),
    [
        ({"model__dtype": "bfloat16"}, True),
        ({"model__dtype": "float32"}, False),
        ({"model__dtype": "bfloat16", "privacy": "none"}, False),
    ],
)
def test_records_of_a_narrow_model_run_alone_since_its_kernels_round_by_one_percent_of_the_bound(
    tiny_config, tmp_path, changes, alone
):
    prepared = prepare(tiny_config(**changes), lambda event: None)
    client = prepared.clients.members[0].client
    assert Host(prepared.host_setup(tmp_path))._node(client).alone is alone
