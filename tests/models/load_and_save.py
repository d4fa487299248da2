"""One of two processes with two devices each: load a folder across both, check this one's share, save it together."""

import sys
from pathlib import Path

import jax


def main(address: str, folder: Path, process: int) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    from rljax.models.hf import load_config, load_params, save_hf
    from tests.models.tiny import layout

    place = layout("1,1,4")
    model = load_config(folder / "in").padded_for(place.tensor)
    params = load_params(folder / "in", model, place)
    held = {shard.data.shape for shard in params["layers"]["gate"].addressable_shards}
    assert held == {(3, 32, 12)} and not params["layers"]["gate"].is_fully_addressable, held
    save_hf(folder / "out", model, params)
    assert (folder / "out" / "config.json").exists()  # nobody goes on before it is there


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
