"""What look-up tables of bytes cost in quality, without a GPU: `pqkv`, reading codes from centroids rounded as such tables are.

    PYTHONPATH=.:kernels python tests/studies/byte_tables.py eval RUN --task kld --generated --limit 40

Everything that attends over codes is rounded, on CPUs too; what encodes is not. Evaluate a copy of the run: results land in it.
"""

import torch

from pqkv_cli.cli.main import main
from pqkv_kernels.format import pairs as planes
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.gpu.tables import _device_tables, _plane_of_entry

_exact = planes._planes


def rounded(tables: CodecTables) -> planes.Planes | None:
    """Return the planes of `tables` with entries of the steps that bytes hold."""
    found = _exact(tables)
    if found is not None:
        scale = _device_tables(found, "int8").scale.flatten()
        for stage in found.stages:
            entries, steps = stage.entries.view(torch.float32).view(-1, 2), scale[_plane_of_entry(stage, found)][:, None]
            entries.copy_((entries / steps).round() * steps)
    return found


if __name__ == "__main__":
    planes._planes = rounded
    main()
