"""The tuner's pruning for real architectures, run as a program without a GPU; prints one JSON object.

faults: for each architecture, what the compiler holds against the default and against tiles that cannot be.
"""

import json

from benchmarks.timing.shapes import LAYERS
from benchmarks.tune import candidates
from benchmarks.tune.candidates import Case, Tile

HOPELESS = {
    "shared": Tile(128, 64, 128, 4, 10, 255),
    "spills": Tile(128, 64, 128, 4, 2, 128),
    "fails": Tile(128, 64, 128, 4, 2, 32),
}


def main() -> None:
    # Here, because the processes that compile import this file, and this takes long.
    from benchmarks.tune.run import survivors

    cases = [Case("up_backward", "gpu-4096", LAYERS["gpu-4096"], "bfloat16", arch) for arch in (80, 89, 90, 100)]
    candidates.CANDIDATES["up_backward", 2] = (HOPELESS["shared"],)
    left = survivors(cases)
    told = {case.arch: [tile == case.default().tile for tile in tiles] for case, tiles in left.items()}
    names = {tile: name for name, tile in HOPELESS.items()}
    found = candidates.faults({cases[2]: list(HOPELESS.values())})
    faults = {names[tile]: why for (_, tile), why in found.items()}
    blocks = {}
    for tile in (Tile(64, 128, 0, 4, 3), Tile(32, 64, 0, 8, 2, 96)):
        launch = candidates._launch(cases[2]._replace(kernel="down"), tile)
        sizes = dict(launch.constants)
        blocks[str(tuple(tile))] = [
            sizes["BLOCK_T"],
            sizes["BLOCK_D"],
            launch.warps,
            launch.stages,
            launch.most_registers,
        ]
    print(json.dumps({"left": told, "faults": faults, "launched": blocks}))


if __name__ == "__main__":
    main()
