"""Reading must equal decoding everything, whatever the codec, the container and the time stamps."""
import os
import random
import re
import shutil

import av
import numpy as np
import pytest
import torch

from common import Video, VideoError, probe, read_clips
from conftest import SHARED

H264 = "keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0"
OPEN = H264 + ":open-gop=1"


def write(path, frames=40, codec="libx264", size=(96, 128), fmt="yuv420p", pts=None, mux={}, x264="", x265="", **more):
    """A texture sliding past, so that every frame differs; mux: options of the container."""
    rng = np.random.default_rng(0)                                      # mostly grey: video halves colour resolution
    texture = (rng.integers(0, 200, (30, 50, 1)) + rng.integers(0, 55, (30, 50, 3))).astype(np.uint8)
    texture = texture.repeat(8, 0).repeat(8, 1)
    options = {**more, "x264-params": x264} if x264 else more
    if x265:
        codec, options = "libx265", {"x265-params": x265 + ":log-level=0"}
    with av.open(str(path), "w", options=mux) as out:
        stream = out.add_stream(codec, rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = *size, fmt
        for i in range(frames):
            y, x = 2 * i % 100, 3 * i % 200
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(texture[y:y + size[0], x:x + size[1]]))
            if pts:
                frame.pts = pts(i)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def remux(path, change, **options):
    """Writes a video, then its packets again as change(number, packet) returns them; it may return None."""
    with av.open(str(write(path.with_stem("before"), **options))) as a, av.open(str(path), "w") as b:
        stream = b.add_stream_from_template(a.streams.video[0])
        for i, packet in enumerate(p for p in a.demux(video=0) if p.size):
            if packet := change(i, packet):
                packet.stream = stream
                b.mux(packet)
    return path


def later(ticks):
    def change(i, packet):
        packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
        return packet
    return change


def cut(first):
    return lambda i, packet: packet if i >= first else None


def no_pts(i, packet):                                                  # as if there were no B-frames
    packet.pts = packet.dts
    return packet


def all_keys(i, packet):
    packet.is_keyframe = True
    return packet


def some_keys(i, packet):                                               # of every group of 12, the middle as well
    packet.is_keyframe |= i % 6 == 4
    return packet


def filled(old, data):
    """A packet with other data."""
    packet = av.Packet(len(data))
    packet.update(data)
    packet.pts, packet.dts, packet.time_base, packet.is_keyframe = old.pts, old.dts, old.time_base, old.is_keyframe
    return packet


def left_out(i, packet):                                                # MPEG-4: a picture that is "not coded"
    if i % 12 != 7:
        return packet
    head = int.from_bytes(bytes(packet)[4:6], "big")                    # type 2, second 1, 1, time 5, 1, coded 1
    return filled(packet, bytes(packet)[:4] + (head & ~63 | 15).to_bytes(2, "big"))


def pack(path, **options):
    """MPEG-4 as of DivX and Xvid: B-frames wait in the packet before theirs, a tiny packet keeps the last place."""
    with av.open(str(write(path.with_stem("unpacked"), codec="mpeg4", **options))) as a:
        data, start = [bytes(p) for p in a.demux(video=0) if p.size], b"\0\0\1\xb6"
    data[0] = data[0].replace(start, b"\0\0\1\xb2DivX503b1393p" + start, 1)
    b_frame, packed = [d[d.index(start) + 4] >> 6 == 2 for d in data] + [False], []
    for i, d in enumerate(data):
        if b_frame[i]:
            d = data[i + 1] if b_frame[i + 1] else bytes.fromhex("000001b6500f07")
        elif b_frame[i + 1]:
            d += data[i + 1]
        packed.append(d)
    return remux(path, lambda i, p: filled(p, packed[i]), codec="mpeg4", **options)


def old_x264(path):
    """4:4:4 without loss as if by an old build of x264, which predicts otherwise; decoders look for its number."""
    data = write(path, 60, fmt="yuv444p", x264="keyint=12:qp=0:8x8dct=1:bframes=0:analyse=i8x8").read_bytes()
    assert data.count(b"x264 - core ") == 1
    path.write_bytes(re.sub(rb"x264 - core \d+", b"x264 - core 140", data))
    return path


def two_sizes(path):
    """VP9 whose picture is smaller after 20 frames."""
    large, small = (write(path.with_stem(f"rows{h}"), 20, "libvpx-vp9", (h, 128), g="10") for h in (96, 60))
    with av.open(str(large)) as a, av.open(str(small)) as b, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(a.streams.video[0])
        for i, packet in enumerate(p for f in (a, b) for p in f.demux(video=0) if p.size):
            packet.stream, packet.pts, packet.dts = stream, 40 * i, 40 * i
            out.mux(packet)
    return path


def cover(path):
    """An attached picture is the first video stream."""
    with av.open(str(write(path.with_stem("video"), x264=H264))) as a, av.open(str(path), "w") as out:
        picture = out.add_stream("mjpeg", rate=1)
        picture.height, picture.width, picture.pix_fmt, picture.disposition = 32, 32, "yuvj420p", 1024
        stream = out.add_stream_from_template(a.streams.video[0])
        out.mux(picture.encode(av.VideoFrame(32, 32, "yuvj420p")) + picture.encode())
        for packet in a.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    data = path.read_bytes()
    to, at = data.index(b"trak") - 4, data.rindex(b"udta") - 4          # move the picture's box before the video's
    end = at + int.from_bytes(data[at:at + 4], "big")
    path.write_bytes(data[:to] + data[at:end] + data[to:at] + data[end:])
    return path


MADE = {
    "closed.mp4": lambda p: write(p, x264=H264), "open.mp4": lambda p: write(p, x264=OPEN),
    "open.ts": lambda p: write(p, x264=OPEN), "one_key.mp4": lambda p: write(p),
    "pyramid.mkv": lambda p: write(p, x264="bframes=8:b-adapt=2:ref=6:keyint=15"),
    "refresh.mp4": lambda p: write(p, x264="intra-refresh=1:keyint=12:bframes=0"),
    "vfr.mkv": lambda p: write(p, pts=lambda i: i * i // 3 + i, x264=H264),
    "negative.mp4": lambda p: remux(p, later(-5 * 512), x264=OPEN),
    "late.mp4": lambda p: remux(p, later(7 * 512), x264=H264),
    "cut_open.mp4": lambda p: remux(p, cut(9), x264=OPEN),              # begins with leading pictures
    "cut_mid.mkv": lambda p: remux(p, cut(4), x264=OPEN),               # begins inside a group
    "fragments.mp4": lambda p: write(p, g="12", mux={"movflags": "frag_keyframe"}),
    "10bit.mp4": lambda p: write(p, fmt="yuv420p10le", x264=H264),
    "odd.mp4": lambda p: write(p, size=(95, 127), fmt="yuv444p", g="12"),
    "one.mp4": lambda p: write(p, 1), "three.mp4": lambda p: write(p, 3),
    "hevc.mp4": lambda p: write(p, x265="keyint=12:bframes=3:open-gop=1"),
    "hevc_radl.mp4": lambda p: write(p, fmt="yuv420p10le", x265="keyint=12:bframes=3:open-gop=0:radl=2"),
    "hevc_layers.mkv": lambda p: write(p, x265="keyint=12:temporal-layers=3"),
    "hevc_cut.mp4": lambda p: remux(p, cut(9), x265="keyint=12:min-keyint=12:bframes=3:open-gop=1"),
    "vp9.webm": lambda p: write(p, codec="libvpx-vp9", g="12", **{"lag-in-frames": "16", "cpu-used": "8"}),
    "vp8.webm": lambda p: write(p, codec="libvpx", g="12"),
    "av1.mp4": lambda p: write(p, codec="libsvtav1", g="12", preset="12"),
    "mpeg4.avi": lambda p: write(p, codec="mpeg4", bf="2", g="12"),
    "mpeg4.mp4": lambda p: write(p, codec="mpeg4", bf="2", g="12"),
    "mpeg2.mpg": lambda p: write(p, codec="mpeg2video", bf="2", g="12"),
    "b1.avi": lambda p: write(p, codec="mpeg4", bf="1", g="10", flags="+qpel"),
    "1x1.mkv": lambda p: write(p, 5, codec="ffv1", size=(1, 1), fmt="yuv444p"),
}
ODD = {                                                                 # packets tell one thing, decoders do another
    "packed.avi": lambda p: pack(p, bf="2", g="12"), "packed1.avi": lambda p: pack(p, bf="1", g="12"),
    "left_out.avi": lambda p: remux(p, left_out, codec="mpeg4", g="12"), "h264.avi": lambda p: write(p, x264=OPEN),
    "no_pts.mp4": lambda p: remux(p, no_pts, x264=H264), "no_pts_open.mp4": lambda p: remux(p, no_pts, x264=OPEN),
    "all_keys.mp4": lambda p: remux(p, all_keys, x264=OPEN), "some_keys.mp4": lambda p: remux(p, some_keys, x264=OPEN),
    "all_keys.avi": lambda p: remux(p, all_keys, codec="mpeg4", bf="2", g="12"), "old_x264.mp4": old_x264,
    "edit.mp4": lambda p: remux(p, later(-9 * 512), x264=OPEN), "cut_open.mkv": lambda p: remux(p, cut(9), x264=OPEN),
    "two_sizes.webm": two_sizes, "cover.mp4": cover,
}
REAL = ["arm_wrestling.mp4", "av1_video.mkv", "h265_video.mp4", "juggling.mp4", "nasa_13013.mp4",
        "nasa_13013_rotated.mp4", "pancake.mkv", "people.mp4", "pool.mp4", "structuralize.mp4",
        "test_non_zero_start.mp4", "testsrc2_odd_height_and_width_vp9.mp4", "ucf_style.avi"]
CASES = ["big_small.webm", "copy_open.avi", "cover_first.mp4", "hflip.mp4", "neg.mkv", "noctts.mp4", "nostss.mp4",
         "nostss_vp9.mp4", "p10.mp4", "paff.mp4"]
FAST = ["closed.mp4", "open.mp4", "open.ts", "pyramid.mkv", "vfr.mkv", "fragments.mp4", "10bit.mp4", "hevc.mp4",
        "vp9.webm", "av1.mp4", "mpeg4.avi", "mpeg4.mp4", "b1.avi", "packed.avi", "cover.mp4",
        "arm_wrestling.mp4", "pancake.mkv", "ucf_style.avi", "nasa_13013_rotated.mp4"]


def make(name, folder):
    """Writes a file of MADE or ODD or names a real one; skips when the encoder or the file is not there."""
    if name in MADE | ODD:
        try:
            return (MADE | ODD)[name](folder / name)
        except (av.codec.codec.UnknownCodecError, av.error.EncoderNotFoundError) as error:
            pytest.skip(f"no encoder: {error}")
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}")
    return SHARED / ("videos" if name in REAL else "cases") / name


def decode_all(path):
    """Every frame of the first stream that is no cover, in the order of decoding, upright, and its time in seconds."""
    with av.open(str(path)) as container:
        stream = next(s for s in container.streams.video if not s.disposition & 1024)
        stream.codec_context.thread_count = 1
        frames = list(container.decode(stream))
    images = [upright(f.to_ndarray(format="rgb24"), f.side_data.get("DISPLAYMATRIX")) for f in frames]
    return images, [f.time for f in frames]


def upright(image, matrix):
    """By a display matrix, pixel by pixel: (x, y) goes to (a x + c y, b x + d y)."""
    if matrix is None:
        return image
    a, b, _, c, d = (int(v) >> 16 for v in np.frombuffer(matrix, np.int32)[:5])
    y, x = np.indices(image.shape[:2])
    to_x, to_y = a * x + c * y, b * x + d * y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    out = np.zeros((to_y.max() + 1, to_x.max() + 1, 3), np.uint8)
    out[to_y, to_x] = image
    return out


def assert_resized(got, image):
    """got is about what torch makes of the image."""
    want = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
    want = torch.nn.functional.interpolate(want, got.shape[:2], mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    assert np.abs(got - want.numpy()).mean() < 4


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write(tmp_path_factory.mktemp("v") / "clip.mp4", 60, size=(120, 160), x264=H264)


@pytest.mark.parametrize("name", [*MADE, *REAL, *ODD, *CASES])
def test_equals_decoding_everything(name, tmp_path):
    path = make(name, tmp_path)
    frames, times = decode_all(path)
    n, rng = len(frames), random.Random(0)
    info = probe(path)
    assert (info.frames, info.height, info.width) == (n, *frames[0].shape[:2])
    sets = [[0], [n - 1], [n - 1, 0, n - 1], list(range(n))[-20:], [min(n // 2 + 4 * k, n - 1) for k in range(16)]]
    sets += [[rng.randrange(n) for _ in range(rng.choice([1, 3, 8]))] for _ in range(6)]
    sets += [[i] for i in (range(n) if name in ODD else rng.sample(range(n), 3) if name in CASES else [])]
    sets = sets[::5] if name == "paff.mp4" else sets                    # of large pictures
    if len({f.shape for f in frames}) > 1:                              # read alone, frames have their own size
        sets = [[i] for indices in sets for i in indices]
    for indices in sets:
        got = read_clips(path, indices)
        for image, i in zip(got, indices):
            assert np.array_equal(image, frames[i]), (indices, i)
    with Video(path) as video:                                          # several reads from one open
        for indices in sets[10::-1]:
            assert all(np.array_equal(image, frames[i]) for image, i in zip(video.read(indices), indices)), indices
        assert name not in FAST or not video.counted
        if name in MADE or name in REAL and name != "ucf_style.avi":    # its times are out of order
            assert n == 1 or info.fps == pytest.approx((n - 1) / (times[-1] - times[0]), rel=0.021)
            for i in rng.sample(range(n), min(n, 12)):
                stop = times[i + 1] if i + 1 < n else times[i] + 9
                assert video.index_at(times[i] - times[0]) == i
                assert video.index_at((times[i] + stop) / 2 - times[0]) == i


def test_info_index_crop_and_size(clip):
    with Video(clip) as video:
        assert video.info == pytest.approx((60, 30, 120, 160, 2), abs=1e-3)
        assert [video.index_at(s) for s in (-1, 0, 0.999, 1, 1.034, 99)] == [0, 0, 29, 30, 31, 59]
    frames, indices = read_clips(clip, [7, 30]), [7, 30, 7]
    boxes = [(11, 7, 91, 67), (0, 60, 80, 120), (0, 60, 80, 120)]
    cuts = [frames[0, 7:67, 11:91], frames[1, 60:120, :80], frames[0, 60:120, :80]]
    assert np.array_equal(read_clips(clip, [7, 30], crop=boxes[0]), frames[:, 7:67, 11:91])
    assert np.array_equal(read_clips(clip, indices, crop=boxes), cuts)
    sized = read_clips(clip, indices, size=(30, 40), crop=boxes)
    assert sized.shape == (3, 30, 40, 3) and sized.dtype == np.uint8 and sized.flags.c_contiguous
    for image, i, box, part in zip(sized, indices, boxes, cuts):
        assert np.array_equal(image, read_clips(clip, [i], size=(30, 40), crop=box)[0])
        assert_resized(image, part)
    whole = read_clips(clip, [7], size=(60, 80))
    assert np.array_equal(whole, read_clips(clip, [7], size=(60, 80), crop=(0, 0, 160, 120)))


@pytest.mark.parametrize("fmt", ["yuv420p", "yuv420p10le", "nv12", "yuyv422", "yuv422p12le", "gbrp10le", "rgb565le"])
def test_crop_in_every_format(fmt, tmp_path):
    """Odd corners too: the same picture as cutting, then resizing."""
    codec = "libx264" if fmt == "yuv420p10le" else "rawvideo" if fmt in ("nv12", "yuyv422", "rgb565le") else "ffv1"
    path = write(tmp_path / "clip.nut", 2, codec, fmt=fmt)
    whole = read_clips(path, [1])[0]
    for x1, y1, x2, y2 in [(11, 7, 91, 67), (10, 6, 90, 66), (1, 0, 128, 96), (127, 95, 128, 96)]:
        assert_resized(read_clips(path, [1], size=(30, 40), crop=(x1, y1, x2, y2))[0], whole[y1:y2, x1:x2])


@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1),
                                    (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, -1, 0), (0, -1, -1, 0)])
def test_display_matrix(matrix, tmp_path, clip):
    """Turned and mirrored as by every display matrix [a b; c d]: whole, cut, resized."""
    path, (a, b, c, d) = tmp_path / "turned.mp4", (v << 16 for v in matrix)
    data, plain = clip.read_bytes(), np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    assert data.count(plain) == 2                                       # of the movie, then of the track
    track = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
    path.write_bytes(data[:data.rindex(plain)] + track + data[data.rindex(plain) + 36:])
    want, still = decode_all(path)[0][20], decode_all(clip)[0][20]
    assert np.array_equal(want, still) == (matrix == (1, 0, 0, 1))
    assert probe(path)[2:4] == want.shape[:2] and np.array_equal(read_clips(path, [20])[0], want)
    x1, y1, x2, y2 = box = 10, 20, 91, 100
    assert np.array_equal(read_clips(path, [20], crop=box)[0], want[y1:y2, x1:x2])
    assert_resized(read_clips(path, [20], size=(40, 60), crop=box)[0], want[y1:y2, x1:x2])
    assert_resized(read_clips(path, [20], size=(40, 60))[0], want)


def test_size_that_changes(tmp_path):
    """Boxes are in pixels of the first frame and cut the same share of a smaller one."""
    path = make("two_sizes.webm", tmp_path)
    frames, _ = decode_all(path)
    assert frames[5].shape == (96, 128, 3) and frames[30].shape == (60, 128, 3)
    got = read_clips(path, [5, 30], size=(30, 40), crop=(8, 16, 104, 80))
    assert_resized(got[0], frames[5][16:80, 8:104])
    assert_resized(got[1], frames[30][10:50, 8:104])
    with pytest.raises(VideoError, match="same shape"):
        read_clips(path, [5, 30])


@pytest.mark.parametrize("name", ["http:a.mp4", "a:b.mp4", "concat:a|b.mp4", "file:a.mp4", "%03d.mp4", "-a.mp4",
                                  "a\nb.mp4", "a#b?.mp4", os.fsdecode(b"\xff.mp4")])
def test_odd_names(name, tmp_path, clip, monkeypatch):
    try:
        shutil.copy(clip, tmp_path / name)
    except (OSError, ValueError):
        pytest.skip("the file system does not take this name")
    monkeypatch.chdir(tmp_path)
    assert probe(name).frames == probe(tmp_path / name).frames == 60


def test_damaged_files(tmp_path):
    """Nothing but VideoError, whatever is in a file; what can be read has the right shape."""
    rng = random.Random(0)
    for name in ("closed.mp4", "vp9.webm", "mpeg4.avi", "open.ts", "pyramid.mkv"):
        whole, path = make(name, tmp_path).read_bytes(), tmp_path / f"damaged-{name}"
        for k in range(25):
            data = bytearray(whole[:rng.randrange(100, len(whole))] if k % 5 == 0 else whole)
            for _ in range(rng.choice([1, 10])):
                at = rng.randrange(min(len(data), 2000) if k % 2 else len(data))
                data[at:at + 30] = rng.randbytes(rng.choice([1, 30]))
            path.write_bytes(data)
            try:
                with Video(path) as video:
                    frames, _, height, width, _ = video.info
                    video.index_at(0.5)
                    last = video.read([frames - 1])
                    assert video.read([0, frames // 2], size=(8, 8), crop=(0, 0, width, height)).shape == (2, 8, 8, 3)
                    assert last.ndim == 4 and frames >= 1 and height >= 1 and width >= 1
            except VideoError as error:
                assert str(error).startswith(str(path))


@pytest.mark.parametrize("indices, crop, text", [
    ([60], None, "60 frames"), ([-1], None, "60 frames"), ([], None, "60 frames"), ([0], (0, 0, 161, 120), "160 x 120"),
    ([0], (0, 0, 160, 121), "box"), ([0], (5, 5, 5, 9), "box"), ([0], (5, 9, 6, 9), "box"), ([0], (-1, 0, 9, 9), "box"),
    ([0], (0, -1, 9, 9), "box"), ([0, 1], [(0, 0, 8, 8), (0, 0, 9, 9)], "same shape")])
def test_wrong_arguments(clip, indices, crop, text):
    with pytest.raises(ValueError, match=rf"clip.mp4.*{text}") as error:
        read_clips(clip, indices, crop=crop)
    assert isinstance(error.value, VideoError) == (text == "same shape")


def broken_files(folder):
    """Paths of files that are no videos, or not whole ones."""
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("hello " * 500)
    paths = [folder / "missing.mp4", folder, folder / "empty.mp4", folder / "text.mp4", folder / "sound.mp4"]
    cut = [("mp4", {}, 0.5), ("webm", {"codec": "libvpx-vp9"}, 0.01), ("avi", {"codec": "mpeg4"}, 0.02),
           ("mov", {"mux": {"movflags": "faststart"}}, 0.5)]
    for suffix, options, share in cut:
        whole = write(folder / f"whole.{suffix}", **options).read_bytes()
        paths.append(folder / f"cut.{suffix}")
        paths[-1].write_bytes(whole[:max(int(share * len(whole)), 400)])
    with av.open(str(folder / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        out.mux(stream.encode(frame) + stream.encode())
    return paths


def test_broken_files_are_errors_and_no_file_stays_open(tmp_path, clip):
    broken = broken_files(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for path in broken * 3:
        read_clips(clip, [3])
        with pytest.raises(VideoError) as error:
            with Video(path) as video:
                video.read([video.info.frames - 1])
        assert str(error.value).startswith(str(path)), (path, error.value)
    assert before is None or len(os.listdir("/proc/self/fd")) == before


def test_long_file_is_not_read_whole(tmp_path):
    def bytes_read():
        return int(open("/proc/self/io").read().split("rchar: ")[1].split()[0])

    if not os.path.exists("/proc/self/io"):
        pytest.skip("no /proc")
    cost = {}
    for frames in (300, 3000):
        path = write(tmp_path / f"{frames}.mp4", frames, g="30", preset="ultrafast")
        before = bytes_read()
        with Video(path) as video:
            video.read(range(frames - 90, frames - 26, 4))
            video.index_at(frames / 60)
        cost[frames] = bytes_read() - before, path.stat().st_size
    assert cost[3000][0] < cost[3000][1] / 4 and cost[3000][0] < cost[300][0] + 40 * 2700  # 40 B a frame: the header
