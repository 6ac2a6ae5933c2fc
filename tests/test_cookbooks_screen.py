"""The cookbooks' screen: every action reaches a real page, pixels are made once, nothing leaves."""

import itertools
import json
import socket
import threading
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_vl_serve import Reply, ToolCall
from utils.agent import run_agent
from utils.agent_function_call import ComputerUse, MobileUse, tool_calls_of
from utils.miniwob import MiniWob, task_names
from utils.screen import Screen, ScreenError

# A page that writes down every event it gets, as [kind, x, y, detail].
RECORDER = """<!doctype html><body style="margin:0; user-select:none"><input id="field" autofocus
 style="position:absolute;left:0;top:0;width:80px;height:20px"><div style="width:3000px;height:3000px"></div>
<script>
window.seen = [];
const note = (event, detail) => seen.push([event.type, event.clientX, event.clientY, detail]);
for (const kind of ['mousemove', 'mousedown', 'mouseup', 'click', 'dblclick', 'auxclick', 'contextmenu'])
  addEventListener(kind, event => note(event, event.button + ':' + event.detail));
for (const kind of ['keydown', 'keyup']) addEventListener(kind, event => note(event, event.key));
addEventListener('wheel', event => note(event, event.deltaX + ',' + event.deltaY));
for (const kind of ['touchstart', 'touchmove', 'touchend'])
  addEventListener(kind, event => {
    const {clientX, clientY} = event.changedTouches[0];
    seen.push([kind, Math.round(clientX), Math.round(clientY), Math.round(event.timeStamp)]);
  }, {passive: false});
</script>"""


def call(tool: str = "computer_use", **arguments) -> ToolCall:
    return ToolCall(tool, json.dumps(arguments))


def reply(*calls: ToolCall, text: str = "") -> Reply:
    return Reply(text, "tool_calls" if calls else "stop", 1, 1, tool_calls=calls)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "recorder.html"
    file.write_text(RECORDER)
    return file


@pytest.fixture(scope="module")
def desktop(page):
    with Screen(page, width=400, height=250) as screen:
        yield screen


@pytest.fixture(scope="module")
def phone(page):
    with Screen(page, width=200, height=400, scale=2, touch=True) as screen:
        yield screen


def do(screen: Screen, tool, **arguments) -> list[list]:
    """What the page saw of one action."""
    screen.evaluate("seen.length = 0")
    screen.act(tool.read_action(call(tool.name, **arguments)))
    screen.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return screen.evaluate("seen")


def kinds(seen: list[list]) -> list[str]:
    return [event[0] for event in seen]


# ---- every action


@pytest.mark.parametrize(
    ("name", "kind", "detail"),
    [
        ("left_click", "click", "0:1"),
        ("right_click", "contextmenu", "2:0"),
        ("middle_click", "auxclick", "1:1"),
        ("double_click", "dblclick", "0:2"),
        ("triple_click", "click", "0:3"),
        ("mouse_move", "mousemove", "0:0"),
    ],
)
def test_the_mouse_does_it_at_the_place(desktop, name, kind, detail):
    seen = do(desktop, ComputerUse, action=name, coordinate=[500, 400])
    assert [kind, 200, 100, detail] in seen
    assert kinds(seen).count("mousedown") == {"mouse_move": 0, "double_click": 2, "triple_click": 3}.get(
        name, 1
    )


def test_a_drag_goes_from_the_pointer_to_the_place(desktop):
    do(desktop, ComputerUse, action="mouse_move", coordinate=[250, 400])
    seen = do(desktop, ComputerUse, action="left_click_drag", coordinate=[750, 800])
    pressed = [event for event in seen if event[0] in ("mousedown", "mouseup")]
    assert [event[:3] for event in pressed] == [["mousedown", 100, 100], ["mouseup", 300, 200]]
    assert kinds(seen).count("mousemove") > 3


def test_keys_are_held_together_and_text_is_typed(desktop):
    desktop.evaluate("field.focus()")
    desktop.act(ComputerUse.read_action(call(action="type", text="Größe 7")))
    assert desktop.evaluate("field.value") == "Größe 7"
    seen = do(desktop, ComputerUse, action="key", keys=["ctrl", "a"])
    assert [(event[0], event[3]) for event in seen] == [
        ("keydown", "Control"), ("keydown", "a"), ("keyup", "a"), ("keyup", "Control"),
    ]  # fmt: skip
    do(desktop, ComputerUse, action="key", keys=["Back_Space"])
    assert desktop.evaluate("field.value") == ""
    with pytest.raises(ValueError, match="keys: 'hyper' is no key"):
        do(desktop, ComputerUse, action="key", keys=["hyper"])


def test_the_wheel_goes_up_and_to_the_right_for_positive_pixels(desktop):
    seen = do(desktop, ComputerUse, action="scroll", pixels=-300)
    assert [event[3] for event in seen if event[0] == "wheel"] == ["0,300"]
    seen = do(desktop, ComputerUse, action="hscroll", pixels=200, coordinate=[100, 800])
    assert [event for event in seen if event[0] == "wheel"] == [["wheel", 40, 200, "200,0"]]
    desktop.evaluate("new Promise(done => setTimeout(() => done(scrollTo(0, 0)), 300))")


def test_touches_reach_the_page(phone):
    seen = do(phone, MobileUse, action="click", coordinate=[500, 500])
    assert seen[0][:3] == ["touchstart", 100, 200] and "click" in kinds(seen)

    seen = do(phone, MobileUse, action="long_press", coordinate=[250, 500], time=0.8)
    assert kinds(seen)[0] == "touchstart" and "touchend" in kinds(seen)
    times = {event[0]: event[3] for event in seen if event[0].startswith("touch")}
    assert times["touchend"] - times["touchstart"] >= 700

    # The browser takes the finger over for scrolling, so the page sees where it began, and moves.
    seen = do(phone, MobileUse, action="swipe", coordinate=[500, 900], coordinate2=[500, 100])
    assert seen[0][:3] == ["touchstart", 100, 360]
    assert phone.evaluate("new Promise(done => setTimeout(() => done(scrollY), 300))") > 200
    phone.evaluate("scrollTo(0, 0)")


def test_the_phones_buttons(phone):
    phone.evaluate("field.focus()")
    phone.act(MobileUse.read_action(call("mobile_use", action="type", text="hi")))
    assert phone.evaluate("field.value") == "hi"
    for button, key in (("Menu", "ContextMenu"), ("Enter", "Enter")):
        seen = do(phone, MobileUse, action="system_button", button=button)
        assert ["keydown", key] in [[event[0], event[3]] for event in seen]
    phone.evaluate("history.pushState({}, '', '#deep'), 1")
    phone.act(MobileUse.read_action(call("mobile_use", action="system_button", button="Back")))
    assert phone.evaluate("location.hash") == ""
    phone.act(MobileUse.read_action(call("mobile_use", action="system_button", button="Home")))
    assert phone.evaluate("field.value") == ""


@pytest.mark.parametrize("tool", [ComputerUse, MobileUse], ids=lambda tool: tool.name)
def test_waiting_and_ending_leave_the_page_alone(desktop, phone, tool):
    screen = desktop if tool is ComputerUse else phone
    assert do(screen, tool, action="wait", time=0.01) == []
    assert do(screen, tool, action="terminate", status="success") == []
    assert do(screen, tool, action="answer", text="42") == []


def test_no_action_of_the_schemas_was_forgotten_here():
    done_above = {
        "computer_use": "key type mouse_move left_click left_click_drag right_click middle_click "
        "double_click triple_click scroll hscroll wait terminate answer",
        "mobile_use": "click long_press swipe type answer system_button wait terminate",
    }
    for tool in (ComputerUse, MobileUse):
        function = tool.schema["function"]
        enum = function["parameters"]["properties"]["action"]["enum"]
        assert set(enum) == set(done_above[tool.name].split())
        used = {field for _, must, may in tool.actions.values() for field in (*must, *may)}
        assert function["parameters"]["properties"].keys() == used | {"action"}


# ---- pixels, once


def test_corners_of_screens_of_any_size(page):
    for (width, height), scale in itertools.product([(97, 61), (1280, 720)], [1, 2]):
        with Screen(page, width=width, height=height, scale=scale) as screen:
            assert screen.screenshot().size == (width * scale, height * scale)
            for corner, pixel in {(0, 0): [0, 0], (1000, 1000): [width - 1, height - 1]}.items():
                seen = do(screen, ComputerUse, action="left_click", coordinate=list(corner))
                assert [event[1:3] for event in seen if event[0] == "click"] == [pixel]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(x=st.integers(0, 1000), y=st.integers(0, 1000))
def test_a_click_lands_on_the_pixel_that_holds_the_place(desktop, x, y):
    seen = do(desktop, ComputerUse, action="mouse_move", coordinate=[1000 - x, 1000 - y])
    seen = do(desktop, ComputerUse, action="left_click", coordinate=[x, y])
    ((_, column, row, _),) = [event for event in seen if event[0] == "click"]
    assert column * 1000 <= x * 400 < (column + 1) * 1000 or (x, column) == (1000, 399)
    assert row * 1000 <= y * 250 < (row + 1) * 1000 or (y, row) == (1000, 249)


@given(width=st.integers(1, 5000), height=st.integers(1, 5000), x=st.floats(0, 1000), y=st.floats(0, 1000))
def test_pixels_are_inside_and_hold_the_place_at_every_size(width, height, x, y):
    screen = Screen.__new__(Screen)
    screen.width, screen.height = width, height
    column, row = screen._pixels((x, y))
    assert 0 <= column < width and 0 <= row < height
    assert (
        abs(column + 0.5 - x * width / 1000) <= 0.5 + 1e-6
        and abs(row + 0.5 - y * height / 1000) <= 0.5 + 1e-6
    )


# ---- what a model may write wrong


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "action=None must be one of key, type"),
        ({"action": "click"}, "action='click' must be one of"),
        ({"action": ["key"]}, "must be one of"),
        ({"action": "left_click"}, "coordinate is missing; left_click needs coordinate"),
        ({"action": "left_click", "coordinate": [500]}, r"coordinate=\[500\] must be \[x, y\]"),
        ({"action": "left_click", "coordinate": [500, 1001]}, "from 0 to 1000"),
        ({"action": "left_click", "coordinate": [-1, 0]}, "from 0 to 1000"),
        ({"action": "left_click", "coordinate": ["1", "2"]}, "coordinate="),
        ({"action": "left_click", "coordinate": [True, 0]}, "coordinate="),
        ({"action": "scroll", "pixels": "far"}, "pixels='far' must be a finite number"),
        ({"action": "wait", "time": 1e9}, "time=1000000000.0 must be seconds from 0 to 30"),
        ({"action": "key", "keys": "ctrl"}, "keys='ctrl' must be a list"),
        ({"action": "type", "text": 5}, "text=5 must be text"),
        ({"action": "terminate", "status": "done"}, "status='done' must be one of success, failure"),
    ],
)
def test_a_wrong_call_names_the_field(arguments, said):
    with pytest.raises(ValueError, match=said):
        ComputerUse.read_action(call(**arguments))


def test_another_tool_and_broken_json_are_named():
    with pytest.raises(
        ValueError, match="name='mobile_use' is no tool that was offered; call 'computer_use'"
    ):
        ComputerUse.read_action(call("mobile_use", action="wait", time=1))
    with pytest.raises(ValueError, match="is no JSON"):
        ComputerUse.read_action(ToolCall("computer_use", "{action"))
    with pytest.raises(ValueError, match=r"arguments=\[\] must be an object"):
        ComputerUse.read_action(ToolCall("computer_use", "[]"))


def test_calls_are_found_in_the_text_of_servers_that_do_not_read_them():
    text = '<tool_call>\n{"name": "computer_use", "arguments": {"action": "wait", "time": 1}}\n</tool_call>'
    assert tool_calls_of(reply(text=text)) == [call(action="wait", time=1)]
    assert tool_calls_of(reply(call(action="key", keys=["a"]), text=text)) == [call(action="key", keys=["a"])]


# ---- nothing leaves

LEAVE = """(async () => {
  const to = '127.0.0.1:%d', wait = time => new Promise(done => setTimeout(done, time));
  const tried = await Promise.allSettled([fetch('http://' + to), fetch('file:///etc/passwd')]);
  new Image().src = 'http://' + to + '/picture';
  navigator.sendBeacon('http://' + to + '/beacon', 'x');
  new WebSocket('ws://' + to);
  const link = document.createElement('link'); link.rel = 'preconnect'; link.href = 'http://' + to;
  document.head.append(link);
  const frame = document.createElement('iframe'); frame.src = 'file:///etc/passwd';
  document.body.append(frame);
  const relay = {urls: 'turn:' + to + '?transport=tcp', username: 'a', credential: 'b'};
  const peer = new RTCPeerConnection({iceServers: [relay]});
  peer.createDataChannel('x'); await peer.setLocalDescription(await peer.createOffer());
  await wait(1500); open('http://' + to + '/window'); await wait(500);
  return tried.map(one => one.status);
})()"""


def test_a_page_reaches_neither_the_network_nor_other_files(page):
    reached = []
    with socket.create_server(("127.0.0.1", 0)) as server, Screen(page, width=300, height=200) as screen:
        port = server.getsockname()[1]
        threading.Thread(target=lambda: reached.append(server.accept()), daemon=True).start()
        assert screen.evaluate(LEAVE % port) == ["rejected", "rejected"]
        assert not reached
        files = screen._do(lambda: [frame.content() for frame in screen._page.frames])
        assert not any("root:" in text for text in files)
        with pytest.raises(ScreenError):  # the address leads nowhere
            screen._do(lambda: screen._page.goto(f"http://127.0.0.1:{port}"))
        assert not reached
        socket.create_connection(("127.0.0.1", port)).close()  # the server did listen


def test_a_page_that_hangs_costs_the_browser_and_no_more(page):
    screen = Screen(page, width=300, height=200, patience=3)
    with pytest.raises(ScreenError, match="did nothing for 3 s; the browser was killed"):
        screen.evaluate("(() => { while (true) {} })()")
    with pytest.raises(ScreenError, match="closed"):
        screen.screenshot()
    screen.close()


# ---- MiniWoB: the page gives the reward


def middle(screen: Screen, script: str) -> list[float]:
    """The middle, 0 to 1000, of the element that a script finds: what a perfect model would aim at."""
    x, y = screen.evaluate(
        f"(() => {{ const box = ({script}).getBoundingClientRect();"
        " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
    )
    return [x / screen.width * 1000, y / screen.height * 1000]


def click(screen: Screen, script: str) -> ToolCall:
    return call(action="left_click", coordinate=middle(screen, script))


def quoted(screen: MiniWob) -> str:
    return screen.instruction.split('"')[1]


def button(text: str) -> str:
    return (
        f"[...document.querySelectorAll('#area button')].find(one => one.textContent == {json.dumps(text)})"
    )


def solve_click_test(screen):
    yield click(screen, "document.querySelector('#subbtn')")


def solve_click_button(screen):
    yield click(screen, button(quoted(screen)))


def solve_click_dialog(screen):
    yield click(screen, "document.querySelector('.ui-dialog-titlebar-close')")


def solve_focus_text(screen):
    yield click(screen, "document.querySelector('#tt')")


def solve_enter_text(screen):
    yield click(screen, "document.querySelector('#tt')")
    yield call(action="type", text=quoted(screen))
    yield click(screen, "document.querySelector('#subbtn')")


def solve_click_link(screen):
    word = json.dumps(quoted(screen))
    yield click(screen, f"[...document.querySelectorAll('.alink')].find(one => one.textContent == {word})")


SOLVED = {
    "click-test": solve_click_test,
    "click-button": solve_click_button,
    "click-dialog": solve_click_dialog,
    "focus-text": solve_focus_text,
    "enter-text": solve_enter_text,
    "click-link": solve_click_link,
}


@pytest.mark.parametrize("task", SOLVED)
def test_a_scripted_policy_earns_the_pages_reward(task):
    with MiniWob(task, seed=7) as screen:
        policy = SOLVED[task](screen)
        assert not screen.outcome().done
        run = run_agent(screen.instruction, screen, lambda _: reply(next(policy)), ComputerUse)
        assert (run.ending, screen.outcome().reward, screen.outcome().solved) == ("page", 1, True)


def test_a_wrong_click_earns_the_pages_reward_too():
    with MiniWob("click-button", seed=9) as screen:
        wrong = button(quoted(screen)).replace("==", "!=")
        run = run_agent("", screen, lambda _: reply(click(screen, wrong)), ComputerUse)
        assert run.ending == "page" and not screen.outcome().solved and screen.outcome().reward == -1


def test_a_seed_decides_the_episode():
    instructions = []
    for seed in (1, 1, 2):
        with MiniWob("click-button", seed=seed) as screen:
            instructions.append((screen.instruction, screen.screenshot().tobytes()))
    assert instructions[0] == instructions[1] != instructions[2]
    with pytest.raises(ValueError, match="near it: click-button"):
        MiniWob("click-buton")
    assert len(task_names()) > 100


# ---- the loop


def test_the_loop_ends_by_its_steps_and_tells_what_went_wrong(desktop):
    asked = []
    replies = iter([
        reply(text="I would click."),
        reply(call(action="left_click", coordinate=[5, 2000])),
        reply(call(action="key", keys=["hyper"])),
        reply(call(action="wait", time=0), call(action="wait", time=0)),
        reply(call(action="mouse_move", coordinate=[500, 500])),
    ])  # fmt: skip

    def ask(messages):
        asked.append(messages)
        return next(replies)

    run = run_agent("Do it.", desktop, ask, ComputerUse, max_steps=5)
    assert (run.ending, len(run.steps)) == ("steps", 5)
    assert [step.action is None for step in run.steps] == [True, True, True, True, False]
    (said,) = [item["text"] for item in asked[-1][0]["content"] if item["type"] == "text"]
    for word in (
        "Do it.",
        "Step 1: error: the reply calls 0 tools",
        "coordinate=[5, 2000]",
        "'hyper'",
        "2 tools",
    ):
        assert word in said
    assert all(sum(item["type"] == "image" for item in one[0]["content"]) == 1 for one in asked)


def test_the_loop_ends_by_the_models_word(desktop):
    run = run_agent("?", desktop, lambda _: reply(call(action="answer", text="four")), ComputerUse)
    assert (run.ending, run.answer, run.status) == ("answer", "four", "")
    run = run_agent("?", desktop, lambda _: reply(call(action="terminate", status="failure")), ComputerUse)
    assert (run.ending, run.answer, run.status) == ("terminate", "", "failure")


def test_a_reply_after_the_time_is_not_acted_upon(desktop):
    late = threading.Event()
    desktop.evaluate("seen.length = 0")

    def ask(_):
        late.wait(0.3)
        return reply(call(action="left_click", coordinate=[500, 500]))

    run = run_agent("?", desktop, ask, ComputerUse, max_seconds=0.1)
    assert (run.ending, len(run.steps)) == ("time", 1)
    assert desktop.evaluate("seen") == []
    with pytest.raises(ValueError, match="max_steps=0"):
        run_agent("?", desktop, ask, ComputerUse, max_steps=0)


def test_a_page_that_crashes_ends_the_run(page):
    screen = Screen(page, width=300, height=200, patience=3)
    screen.evaluate("setTimeout(() => { while (true) {} }, 500), 1")
    run = run_agent("?", screen, lambda _: reply(call(action="wait", time=1)), ComputerUse)
    assert run.ending == "crash" and "killed" in run.crash and replace(run, steps=()).status == ""
