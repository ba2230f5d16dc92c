"""Scene cuts by PySceneDetect's adaptive detector, as StreamingT2V's SCuts counts them (arXiv 2403.14773)."""

import numpy as np

from vstar_engine.errors import MissingLibrary

# frames; the library's own 15 is for films, while a state of a short clip may last less
SHORTEST_SCENE = 4


def scene_cuts(frames: np.ndarray, fps: float = 8.0) -> list[int]:
    """Returns the frames that begin a new scene, of (T, H, W, 3) uint8; MissingLibrary names the extra to install."""
    try:
        from scenedetect import FrameTimecode
        from scenedetect.detectors import AdaptiveDetector
    except ImportError as error:
        raise MissingLibrary("scene cuts need PySceneDetect: pip install 'vstar-engine[metrics]'") from error
    detector = AdaptiveDetector(min_scene_len=SHORTEST_SCENE)
    found: list[int] = []
    for index, frame in enumerate(frames):
        # OpenCV's order of colours
        cuts = detector.process_frame(FrameTimecode(index, fps), np.ascontiguousarray(frame[..., ::-1]))
        found += [cut.frame_num for cut in cuts]
    return found
