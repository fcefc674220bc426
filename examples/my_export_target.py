"""An export target of your own: a program of torch.export, which runs without mls and without the network's source.

mls export runs/mls_scenes_tiny-… --import examples/my_export_target.py --to program
"""

from pathlib import Path

import torch

from mls import exporting
from mls.exporting.certify import Loaded
from mls.exporting.source import Source, normalised

RECIPE = "use_program.py"
SNIPPET = '''"""Features of an image tensor, uint8 [batch, 3, {size}, {size}], RGB."""

from pathlib import Path

import torch

MEAN = {mean}  # of pixels from 0 to 255
STD = {std}
network = torch.export.load(Path(__file__).with_name("backbone.pt2")).module()


def features(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return network((images.float() - mean) / std)
'''


@exporting.register("program", recipes=[RECIPE])
class Program:
    FILE = "backbone.pt2"

    def write(self, source: Source, folder: Path, final: Path) -> list[str]:
        example = normalised(source.pixels(), source.mean, source.std)
        batch = {0: torch.export.Dim("batch", min=1)}
        torch.export.save(torch.export.export(source.backbone, (example,), dynamic_shapes=(batch,)), folder / self.FILE)
        size = source.card["input_size"]
        (folder / RECIPE).write_text(SNIPPET.format(size=size, mean=source.mean, std=source.std))
        return [RECIPE]

    def load(self, source: Source, file: Path, recipe: Path | None) -> Loaded:
        """What the certificate compares: the tensors that the file holds, and the features that it gives."""
        network = torch.export.load(file).module()

        @torch.no_grad()
        def stages(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"features": network(normalised(pixels, source.mean, source.std))}

        return Loaded(file, recipe, f"torch {torch.__version__}", network.state_dict(), stages)
