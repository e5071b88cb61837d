import pytest
import torch

from accel.call import Kind
from accel.sampling import SegmentPlan, causal_blocks, diffusion_forcing, next_clip
from accel.schedule import flow_sigmas
from tests.fakes import SmoothDenoiser, make_run, video


def noise(frames, seed=0):
    return torch.randn(2, 3, frames, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_segments_overlap_in_clean_frames_and_cover_the_video_once():
    plan = SegmentPlan(52, 16, 4, 4, 5, 50)
    assert plan.intervals() == [(0, 16, 0), (12, 28, 4), (24, 40, 4), (36, 52, 4)]
    assert plan.calls() == 65 + 3 * 60
    segments = list(diffusion_forcing(make_run(), noise(52), SegmentPlan(52, 16, 4, 4, 2, 4), flow_sigmas(4)))
    assert [(s.start, s.end) for s in segments] == [(0, 16), (16, 28), (28, 40), (40, 52)]
    assert video(segments).shape[2] == 52


def test_skyreels_257_frames_make_200_rows():
    assert SegmentPlan(65, 25, 5, 5, 5, 50).calls() == 200


def test_a_segment_starts_from_its_own_noise_and_the_last_frames_so_far():
    plan, x = SegmentPlan(10, 6, 2, 2, 0, 3), noise(10)
    run = make_run()
    seen = {}
    original = run.denoiser.velocity

    def spy(call, window):
        seen.setdefault(call.segment, window.clone())
        return original(call, window)

    run.denoiser.velocity = spy
    first, second = diffusion_forcing(run, x, plan, flow_sigmas(3))
    assert torch.equal(seen[1][:, :, :2], first.latents[:, :, -2:])
    assert torch.equal(seen[1][:, :, 2:], x[:, :, 6:])
    assert second.start == 6


def test_one_euler_loop_by_hand_gives_the_same_video():
    x, table = noise(4), flow_sigmas(5, 3.0)
    out = video(diffusion_forcing(make_run(), x, SegmentPlan(4, 4, 0, 4, 0, 5), table))
    model, y = SmoothDenoiser(), x.clone()
    call_of = make_run()
    list(diffusion_forcing(call_of, x, SegmentPlan(4, 4, 0, 4, 0, 5), table))
    for call, now, then in zip(call_of.denoiser.calls, table[:-1], table[1:], strict=True):
        y = y + (then - now) * model.velocity(call, y)
    assert torch.allclose(out, y, atol=1e-12)


def test_streaming_and_the_number_of_calls():
    seen = []
    plan = SegmentPlan(10, 6, 2, 2, 1, 4)
    list(diffusion_forcing(make_run(), noise(10), plan, flow_sigmas(4), progress=lambda call, x: seen.append(call)))
    assert len(seen) == plan.calls()


def test_given_latents_are_continued():
    x, given = noise(8), noise(2, seed=9)
    segments = list(diffusion_forcing(make_run(), x, SegmentPlan(8, 8, 2, 2, 0, 3), flow_sigmas(3), prefix=given))
    assert segments[0].start == 2 and segments[0].latents.shape[2] == 6


def test_history_noise_is_shown_to_the_model_and_never_kept():
    run = make_run()
    plan = SegmentPlan(10, 6, 2, 2, 0, 3)
    first, _ = diffusion_forcing(run, noise(10), plan, flow_sigmas(3), history_noise=0.02)
    assert run.denoiser.calls[-1].sigmas[:2] == (0.02, 0.02)
    plain = list(diffusion_forcing(make_run(), noise(10), plan, flow_sigmas(3)))
    assert torch.equal(first.latents, plain[0].latents)


def test_causal_blocks_commit_once_a_block_and_renoise_as_core_does():
    x, table = noise(7).float(), torch.tensor([1.0, 0.9, 0.6, 0.0])
    run = make_run()
    out = video(causal_blocks(run, x, 3, table, renoise_seed=42))
    assert out.shape == x.shape
    assert [call.kind for call in run.denoiser.calls].count(Kind.COMMIT) == 3
    model, start = SmoothDenoiser(), 0
    calls = iter(call for call in run.denoiser.calls if call.kind is Kind.DENOISE)
    for block, width in enumerate((3, 3, 1)):
        y = x[:, :, start : start + width]
        for step in range(3):
            y0 = y - float(table[step]) * model.velocity(next(calls), y)
            generator = torch.Generator().manual_seed(42 + block * 1000 + step)
            then = float(table[step + 1])
            y = y0 if then == 0 else (1 - then) * y0 + then * torch.randn(y0.shape, generator=generator)
        assert torch.allclose(out[:, :, start : start + width], y, atol=1e-6)
        start += width


def test_a_global_generator_is_never_touched():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(causal_blocks(make_run(), noise(4).float(), 2, torch.tensor([1.0, 0.5, 0.0]), renoise_seed=1))
    list(diffusion_forcing(make_run(), noise(10), SegmentPlan(10, 6, 2, 2, 0, 2), flow_sigmas(2), history_noise=0.1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((50, 16, 4, 4, 5, 50), "50 latent frames leave 2 over after blocks of 4.*use 48 or 52"),
        ((52, 15, 4, 4, 5, 50), "segment is 15.*use 12 or 16"),
        ((52, 16, 3, 4, 5, 50), "overlap is 3"),
        ((52, 16, 16, 4, 5, 50), "leaves nothing new.*at most 12"),
        ((0, 16, 4, 4, 5, 50), "must be 1 or more"),
    ],
)
def test_plans_that_cannot_be_denoised_whole_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        SegmentPlan(*arguments)


def test_a_model_with_a_time_per_frame_is_no_next_clip_model():
    with pytest.raises(ValueError, match="use diffusion forcing"):
        list(next_clip(make_run(), noise(4), SegmentPlan(4, 4, 0, 4, 0, 2), flow_sigmas(2)))


def test_noise_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"noise must be \[batch, channels, 10"):
        list(diffusion_forcing(make_run(), noise(8), SegmentPlan(10, 6, 2, 2, 0, 2), flow_sigmas(2)))
