"""The page in a real browser: a key, a prompt with states on the timeline, progress, a video that plays, a cancellation."""

import json
import time

import pytest

import support.serve_packages  # noqa: F401 - skips where they are missing
from support.browser import browser
from support.servers import Server
from vstar_engine.config.timeline import place

pytestmark = pytest.mark.reliability

KEY = "a-key-for-the-browser-0123456789"


@pytest.fixture
def server(tmp_path):
    with Server(tmp_path / "server", keys=(KEY,), slow={"step": 0.15}) as made:
        made.http.headers["authorization"] = f"Bearer {KEY}"
        yield made
        made.ledger()


@pytest.fixture
def quick(tmp_path):
    """A server that asks for no key."""
    with Server(tmp_path / "server") as made:
        yield made
        made.ledger()


# answers to paths that hold `held` wait until `release()`; what was asked for is in `asked`
HOLD = """
const real = fetch; window.asked = []; window.held = null;
const gate = new Promise(open => { window.release = open; });
window.fetch = async (path, options) => {
  asked.push(path);
  if (held && path.includes(held)) await gate;
  return real(path, options);
};
"""
# whether a browser can still read what a URL names
PLAYS = """
const video = document.createElement('video'), [src] = arguments;
return new Promise(done => { Object.assign(video, { onloadeddata: () => done(true), onerror: () => done(false), src }); });
"""
CLIPS = "return asked.filter(path => path.includes('variant=video')).length"


def complaints(page):
    """Returns what the console holds but for the refusals that asking without a key brings."""
    return [line for line in page.complaints() if "401" not in line]


def test_a_visitor_makes_a_video_and_watches_it(server, tmp_path):
    with browser(tmp_path) as page:
        page.goto(server.url)
        page.type("#secret", KEY)
        page.click("#door [value=keep]")
        page.until("return document.getElementById('health').textContent === 'ready'")

        page.type("#prompt", "a landscape from winter to spring")
        for number, words in enumerate(["deep snow", "the snow melts", "flowers bloom"], 1):
            page.click("#add")
            page.type(f".state:nth-child({number}) input", words)
        page.drag(".handle[aria-label='state 2']", right=-60)
        page.run("document.querySelector('details').open = true")
        page.run("const frames = document.getElementById('frames'); frames.value = 12; frames.oninput()")
        page.run("document.getElementById('steps').value = 20; document.getElementById('seed').value = 3")
        page.type("#dial", "\ue012")  # the left arrow, once: calmer
        page.click("#go")

        page.until("const card = document.querySelector('.job .meta'); return card && /step \\d+ of 20/.test(card.textContent)")
        page.until("const i = document.querySelector('.job .progress i'); return i && parseInt(i.style.width) > 20")
        page.until("const strip = document.querySelector('.job .strip img'); return strip && strip.naturalWidth > 0")

        page.click("#gallery [data-status=completed]")
        playing = "const v = document.getElementById('player'); return v.currentTime > 0.2 && v.videoWidth"
        assert page.until(playing, seconds=30) == 64
        assert "deep snow" in page.text("#details")
        saved = page.run("return document.getElementById('download').download")
        page.click("#download")
        page.until("return true")
        wait_for(tmp_path / saved)

        (video,) = server.every()
        assert (video["num_frames"], video["num_inference_steps"], video["seed"]) == (12, 20, 3)
        assert video["synopsis"] == ["deep snow", "the snow melts", "flowers bloom"]
        assert 1.0 < video["tar"]["sigma"]["0"] < 1.2
        assert video["tar"]["sigma"]["1"] == 8
        assert (tmp_path / saved).stat().st_size == video["bytes"]
        assert not complaints(page)


def wait_for(path):
    for _ in range(200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path.name} was not downloaded")


def test_a_visitor_cancels_and_deletes(server, tmp_path):
    ended = server.wait(server.create("one that is there"))["id"]
    with browser(tmp_path) as page:
        page.goto(server.url)
        page.type("#secret", KEY)
        page.click("#door [value=keep]")
        page.find(f"#gallery [data-id={ended}]")
        page.type("#prompt", "step=0.5 for a long time")
        page.click("#go")
        page.click(".job .danger")
        page.until(
            "return [...document.querySelectorAll('#gallery .shot')].some(card => card.textContent.includes('cancelled'))"
        )
        statuses = {video["prompt"]: video["error"] and video["error"]["code"] for video in server.every()}
        assert statuses == {"one that is there": None, "step=0.5 for a long time": "cancelled"}
        page.click(f"#gallery [data-id={ended}]")
        page.click("#remove")
        page.until("return document.querySelectorAll('#gallery .shot').length === 1")
        assert [video["prompt"] for video in server.every()] == ["step=0.5 for a long time"]
        assert not complaints(page)


def test_a_wrong_key_opens_the_door_again_and_words_never_become_markup(server, tmp_path):
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    server.wait(server.create(evil))
    with browser(tmp_path) as page:
        page.goto(server.url)
        page.type("#secret", "not-a-key-0123456789")
        page.click("#door [value=keep]")
        page.until("return document.getElementById('door').open")
        page.type("#secret", "\ue009a")  # select what is there, and write over it
        page.run("document.getElementById('secret').value = arguments[0]", KEY)
        page.click("#door [value=keep]")
        page.find("#gallery .shot")
        assert page.text("#gallery .words") == evil
        page.click("#gallery .shot")
        assert page.text("#title") == evil
        assert page.run("return document.title") == "vstar-engine"
        assert json.loads(page.run("return JSON.stringify(Object.values(localStorage))")) == []


def test_a_server_without_keys_needs_none_and_a_lost_one_is_said(tmp_path):
    with Server(tmp_path / "server") as server, browser(tmp_path, (500, 900), dark=True) as page:
        page.goto(server.url)
        page.until("return document.getElementById('health').textContent === 'ready'")
        assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(16, 16, 24)"
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")
        page.devtools("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")
        assert page.run("return document.querySelector('.bar').offsetHeight") < 70  # one line
        server.kill()
        page.until("return document.getElementById('health').textContent === 'not reachable'", seconds=40)


def test_a_slow_video_does_not_take_the_place_of_another(quick, tmp_path):
    first, second = (quick.wait(quick.create(f"number {i}"))["id"] for i in range(2))
    with browser(tmp_path) as page:
        page.goto(quick.url)
        page.run(HOLD + "held = arguments[0]", f"{first}/content?variant=video")
        page.click(f"#gallery [data-id={first}]")
        page.click("#close")
        page.click(f"#gallery [data-id={second}]")
        shown = page.until("return document.getElementById('player').videoWidth && document.getElementById('player').src")
        assert page.run(PLAYS, shown)
        page.run("release(); return new Promise(done => setTimeout(done, 1000))")
        assert page.run("return document.getElementById('player').src") == shown
        assert page.run("return document.getElementById('download').download") == f"{second}.mp4"
        assert page.run("return document.getElementById('download').href") == shown
        page.click("#close")
        page.until("return !document.getElementById('player').src")
        assert not page.run(PLAYS, shown)


def test_a_clip_plays_only_under_a_mouse_that_rests_and_is_let_go(quick, tmp_path):
    id = quick.wait(quick.create())["id"]
    with browser(tmp_path) as page:
        page.goto(quick.url)
        page.find(f"#gallery [data-id={id}] img")
        page.run(HOLD)
        page.run("document.querySelector('#gallery .shot').focus()")
        page.hover("#gallery .shot")
        page.hover("#prompt")
        page.run("return new Promise(done => setTimeout(done, 1000))")
        assert page.run(CLIPS) == 0
        page.hover("#gallery .shot")
        clip = page.until("const clip = document.querySelector('#gallery video'); return clip?.currentTime > 0 && clip.src")
        page.hover("#prompt")
        page.until("return !document.querySelector('#gallery video')")
        assert not page.run(PLAYS, clip)

        page.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
        page.hover("#gallery .shot")
        page.run("return new Promise(done => setTimeout(done, 1000))")
        assert page.run(CLIPS) == 1
        page.click("#gallery .shot")
        page.until("return document.getElementById('player').videoWidth")
        assert page.run("return document.getElementById('player').paused")


# pages of two, so that five videos are three pages
PAIRS = "const real = fetch; fetch = (path, options) => real(path.replace('limit=50', 'limit=2'), options);"
# a server that cannot be asked for older videos until `online()`
OFFLINE = """
const real = fetch; window.online = () => { fetch = real; };
fetch = async (path, options) => { if (path.includes('after=')) throw TypeError('offline'); return real(path, options); };
"""
LISTED = "return [...document.querySelectorAll('#gallery .shot')].map(card => card.dataset.id).join() === arguments[0]"
SHOWN = "return document.querySelectorAll('#gallery .shot').length"


def test_older_videos_are_shown_though_the_oldest_known_was_deleted(quick, tmp_path):
    ids = []
    for i in range(5):
        ids.append(quick.wait(quick.create(f"number {i}"))["id"])
        time.sleep(1.05)  # videos are as old as their second says
    with browser(tmp_path) as page:
        page.devtools("Page.addScriptToEvaluateOnNewDocument", source=PAIRS)
        page.goto(quick.url)
        page.until(f"{SHOWN} === 2")
        page.run("clearTimeout(timer)")
        assert quick.http.delete(f"/v1/videos/{ids[3]}").status_code == 200
        page.click("#older")
        page.until(f"{SHOWN} >= 3")
        page.run("wake(0)")
        page.until(LISTED, ",".join([ids[4], *ids[2:0:-1]]))
        page.run(OFFLINE)
        page.click("#older")
        page.until("return document.getElementById('missed').textContent === 'The server cannot be reached.'")
        page.run("online()")
        page.click("#older")
        page.until(f"{SHOWN} === 4")
        assert page.run("return document.getElementById('missed').hidden && document.getElementById('older').hidden")
        assert not [line for line in page.complaints() if "Uncaught" in line]


USE = "use(arguments[0]); return JSON.parse(JSON.stringify(body()))"


def test_the_settings_of_a_video_come_back_whole(quick, tmp_path):
    """What the page would send again is what made the video, as the API shows it."""
    said = {"prompt": "a seed grows", "seed": 7, "fps": 12.5, "num_inference_steps": 400, "guidance_scale": 3.25, "eta": 0.25}
    said |= {"priority": 2, "negative_prompt": "", "num_frames": 300, "size": "1216x64", "spread": "ease"}
    tar = {"sigma": {"0": 20.125, "1": 4, "2": 9}, "strength": 0.75, "until_step": 5}
    states = [("a seed", 0, "snow"), ("a bud", 0.5, None), ("a bloom", 299, "rain")]
    states = [{"text": text, "at": at, "duration": None, "negative": negative} for text, at, negative in states]
    with browser(tmp_path) as page:
        page.goto(quick.url)
        page.until("return document.getElementById('health').textContent === 'ready'")
        sent = page.run(USE, {**said, "tar": tar, "states": states, "embeddings": "garden"})
        assert sent.pop("tar") == {"sigma": tar["sigma"], "strength": 0.75, "until": 5}
        assert sent.pop("synopsis") == [
            {"text": "a seed", "at": 0, "negative": "snow"},
            {"text": "a bud", "at": 150},
            {"text": "a bloom", "at": 299, "negative": "rain"},
        ]
        assert sent == {name: value for name, value in said.items() if value != ""}
        assert page.text("#coarser") == "and 4 at level 1, 9 at level 2, strength 0.75, until step 5"
        assert "garden" in page.text("#note")
        assert page.run("return document.querySelector('.unwanted').value") == "snow"
        assert page.run("return document.getElementById('composer').checkValidity()")

        plain = {**said, "tar": None, "synopsis": ["a seed", "a bloom"]}
        sent = page.run(USE, plain)
        assert (sent["tar"], sent["synopsis"]) == ("none", ["a seed", "a bloom"])
        assert page.run("return document.getElementById('note').hidden")

        page.run("document.querySelector('details').open = false; document.getElementById('fps').value = 100")
        page.click("#go")
        assert page.run("return document.querySelector('details').open")


PLACED = """
['frames', 'spread'].forEach((id, i) => { document.getElementById(id).value = arguments[i]; });
return placed(arguments[2]);
"""


def test_states_stand_where_the_engine_puts_them(quick, tmp_path):
    """Positions and durations of a video's states become the frames that the engine gives them."""
    at = [[0, 0.5, 1.0], [0, 1, 0.25, 31], [0.0, 1.0], [0, 0.3, 0.35]]
    lasting = [[1, 1], [1, 2.5, 3], [5, 1, 1, 1]]
    cases = [(frames, mode, {"at": places}) for frames in (32, 33) for mode in ("linear", "hold") for places in at]
    cases += [(frames, mode, {"durations": each}) for frames in (32, 33, 62) for mode in ("ease", "hold") for each in lasting]
    cases = [case for case in cases if right(*case)]
    assert len(cases) > 20
    with browser(tmp_path) as page:
        page.goto(quick.url)
        for frames, mode, where in cases:
            ((name, values),) = where.items()
            states = [{"text": "a", name.removesuffix("s"): value} for value in values]
            placed = page.run(PLACED, frames, mode, states)
            assert placed == place(len(states), frames, mode, **where), (frames, mode, where)


def right(frames, mode, where):
    """Returns whether the engine takes it, and JSON can tell it."""
    try:
        place(len(next(iter(where.values()))), frames, mode, **where)
    except ValueError:
        return False
    return (mode, where) != ("hold", {"at": [0.0, 1.0]})


# what a screen reader says: every change of a region that is spoken
LISTEN = """
window.spoken = [];
new MutationObserver(changes => changes.forEach(({ target }) => {
  const region = (target.closest ? target : target.parentElement).closest('[aria-live], [role=status], [role=alert]');
  if (region) spoken.push(region.textContent);
})).observe(document.body, { subtree: true, childList: true, characterData: true });
"""
# the least contrast of the numbers of states, by what the browser paints
CONTRAST = """
const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
const luminance = colour => {
  canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
return Math.min(...[...document.querySelectorAll('.state .number, .handle b')].map(getComputedStyle).map(style => {
  const [low, high] = [style.color, style.backgroundColor].map(luminance).sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}));
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_timeline_is_for_keys_and_fingers_and_can_be_read(quick, tmp_path, dark):
    with browser(tmp_path, dark=dark) as page:
        page.goto(quick.url)
        page.until("return document.getElementById('health').textContent === 'ready'")
        for number in range(1, 9):
            page.click("#add")
            page.type(f".state:nth-child({number}) input", "a")
        assert page.run(CONTRAST) >= 4.5
        handle = (
            "return Object.fromEntries([...document.querySelector(\".handle[aria-label='state 4']\").attributes]"
            ".map(({ name, value }) => [name, value]))"
        )
        before = page.run(handle)
        assert (before["role"], before["aria-valuenow"], before["aria-valuemax"]) == ("slider", "27", "63")
        assert before["aria-valuetext"] == "frame 27, 3.4 s"
        page.run("document.querySelector(\".handle[aria-label='state 4']\").focus()")
        page.type(".handle[aria-label='state 4']", "\ue014\ue013")  # right, up
        assert page.run(handle)["aria-valuenow"] == "29"
        page.take_away(".handle[aria-label='state 4']", right=20)
        left = page.run(handle)["aria-valuenow"]
        assert left != "29"
        for right in (4, 8):
            page.hover(".handle[aria-label='state 4']", right=right)
        assert page.run(handle)["aria-valuenow"] == left
        assert not complaints(page)


def test_starts_and_ends_alone_are_spoken(quick, tmp_path):
    with browser(tmp_path) as page:
        page.goto(quick.url)
        page.until("return document.getElementById('health').textContent === 'ready'")
        page.run(LISTEN)
        page.run("document.getElementById('steps').value = 6")
        for count, prompt in enumerate(("a tree, step=0.3", "error@3 and step=0.3"), 1):
            page.run("document.getElementById('prompt').value = arguments[0]", prompt)
            page.click("#go")
            page.until("return document.querySelector('.job .progress')?.getAttribute('aria-valuenow') > 20")
            page.until(f"{SHOWN} === arguments[0]", count)
        spoken = page.run("return spoken")
        assert spoken[:2] == ["a tree, step=0.3: started", "a tree, step=0.3: done"]
        assert len(spoken) == 4
        assert spoken[2] == "error@3 and step=0.3: started"
        assert spoken[3].startswith("error@3 and step=0.3: ")
