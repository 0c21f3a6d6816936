"""Signals beside a video: optical flow, maps, pictures in folders, arrays, 3D points."""

import numpy as np
import pytest
import torch
from PIL import Image

from crab_min.data import load_media
from crab_min.errors import MediaError
from crab_min.interface import PromptPart
from crab_min.media.arrays import point_code, read_points
from crab_min.media.flow import flow_pictures
from crab_min.media.read import read_flow, read_video
from crab_min.media.write import write_video
from crab_min.side_channels import side_part
from crab_min.world.rendering import Renderer
from crab_min.world.side_channels import build_side_world, make_show

NAMES = ["audio", "flow", "depth", "normals", "thermal", "touch", "points"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """The folder of the videos of a small world, with their maps and points."""
    rows = build_side_world("", 8, 2, 0, NAMES, tmp_path_factory.mktemp("shows"), together=True)
    return rows.parents[1]


def seconds_of(scene, marked, name):
    """Return for each of ten seconds whether the scene is marked then in the channel `name`."""
    start, end = scene.objects[marked[name]].seen[0]
    return np.isin(np.arange(10), range(start, end))


# --- optical flow ---------------------------------------------------------------------------------
def colour_of(x: float, y: float) -> np.ndarray:
    """Return the colour of a movement by x and y widths of the picture."""
    return flow_pictures(np.full((1, 1, 1, 2), (x, y)))[0, 0, 0].astype(int)


def test_flow_is_where_things_move(tmp_path):
    """A square moves to the right, half a pixel per frame, before a grey wall."""
    rng = np.random.default_rng(0)
    frames = np.full((50, 64, 64, 3), 120, np.uint8)
    square = rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)
    for t in range(50):
        frames[t, 20:44, 8 + t // 2 : 32 + t // 2] = square
    write_video(tmp_path / "x.mp4", frames, None)
    flow = read_flow(tmp_path / "x.mp4", 3, 64)
    assert flow.frames.shape == (3, 64, 64, 3)

    inside = flow.frames[1, 28:36, 26:36].reshape(-1, 3).astype(int)
    assert np.abs(inside - colour_of(1 / 64, 0)).mean() < 60
    assert inside[:, 0].mean() > inside[:, 2].mean()
    assert colour_of(1, 0)[0] > colour_of(1, 0)[2]
    assert (flow.frames[1, :10] > 235).mean() > 0.9  # nothing moves there


def test_flow_shows_what_trembles_in_the_film_as_in_the_map(videos):
    renderer = Renderer()
    hits = 0
    for index in range(8):
        scene, marked = make_show(renderer, "train", index, 0)
        film = read_flow(videos / f"{scene.name}.mp4", 10, 96).frames
        exact = np.load(videos / f"{scene.name}_flow.npy")
        inside = seconds_of(scene, marked, "flow")
        for pictures in (film, exact):
            movement = (255 - pictures.min(-1).astype(float)).mean((1, 2))
            hits += movement[inside].min() > movement[~inside].max()
    assert hits >= 15


def test_no_frame_of_a_show_tells_what_trembles():
    renderer = Renderer()
    times = [*np.arange(10), *(np.arange(10) + 0.5)]
    for index in range(4):
        scene, marked = make_show(renderer, "train", index, 0)
        trembling = renderer.frames(scene, times)
        scene.objects[marked["flow"]].trembles = 0
        assert np.array_equal(trembling, renderer.frames(scene, times))


# --- maps and points ------------------------------------------------------------------------------
STRENGTHS = {
    "depth": lambda x: (x[..., 0] - x[..., 2]).max(),
    "thermal": lambda x: x[..., 1].max(),
    "touch": np.std,
    "normals": lambda x: -x[..., 0].min(),
}


def test_maps_and_points_mark_the_seconds_that_the_answer_tells(videos):
    renderer = Renderer()
    for index in range(8):
        scene, marked = make_show(renderer, "train", index, 0)
        for name, strength in STRENGTHS.items():
            x = np.load(videos / f"{scene.name}_{name}.npy").astype(float)
            values = np.array([strength(step) for step in x])
            inside = seconds_of(scene, marked, name)
            assert values[inside].min() > values[~inside].max(), name
        xyz, _ = read_points(str(videos / f"{scene.name}_points.npz"))
        is_far = xyz[..., 2].mean(1) > 150
        assert is_far.tolist() == seconds_of(scene, marked, "points").tolist()


# --- files ----------------------------------------------------------------------------------------
def test_pictures_in_a_folder_are_a_video_in_the_order_of_their_numbers(tmp_path):
    for i in (2, 10, 1):
        picture = Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8))
        picture.save(tmp_path / f"{i}.png")
    video = read_video(tmp_path, 3, 4)
    assert [int(frame.mean()) for frame in video.frames] == [20, 40, 200]
    assert video.seconds == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(MediaError, match="a folder without pictures"):
        read_video(tmp_path / "empty")


def test_arrays_of_bytes_are_pictures(tmp_path):
    file = tmp_path / "grey.npy"
    grey = np.arange(4, dtype=np.uint8)[:, None, None] * np.full((4, 6, 6), 10, np.uint8)
    np.save(file, grey)
    frames, _ = load_media(PromptPart("array", path=str(file), frames=2), 12)
    assert frames.shape == (2, 12, 12, 3)
    assert [int(frame.mean()) for frame in frames] == [10, 30]
    np.save(file, np.zeros((4, 6, 6, 5), np.uint8))
    with pytest.raises(MediaError, match="bytes of shape .4, 6, 6, 5.; pictures are"):
        load_media(PromptPart("array", path=str(file)), 12)


def test_points_are_read_in_cremas_form_with_the_code_of_their_places(tmp_path):
    """Features in one folder, places in another; the places are added as sines and cosines."""
    rng = np.random.default_rng(0)
    xyz = rng.integers(0, 256, (7, 3))
    features = rng.normal(size=(7, 1408)).astype(np.float32)
    for kind in ("features", "voxels"):
        (tmp_path / f"voxelized_{kind}_sam_nonzero_preprocess").mkdir()
    file = tmp_path / "voxelized_features_sam_nonzero_preprocess/scene.pt"
    torch.save(torch.as_tensor(features), file)
    np.save(tmp_path / "voxelized_voxels_sam_nonzero_preprocess/scene.npy", xyz)

    part = side_part("points", str(file), [], [])
    x, _ = load_media(part, 12)
    assert part.kind == "points" and x.shape == (1, 7, 1408)
    code = (x[0] - features) / 0.01
    assert np.allclose(code[:, 0], np.sin(xyz[:, 0]), atol=1e-3)
    assert np.allclose(code[:, 470], np.cos(xyz[:, 1]), atol=1e-3)
    assert not code[:, 1407].any()
    assert point_code(np.zeros((2, 9000, 3), int)).shape == (2, 5000, 96)

    np.savez(tmp_path / "bad.npz", places=xyz)
    with pytest.raises(MediaError, match="not 3D points"):
        read_points(str(tmp_path / "bad.npz"))
