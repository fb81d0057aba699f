"""The canonical sample survives the form that chat templates take."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xtuner_core.data.conversation import ROLES, Message, ToolCall

maybe = st.none() | st.text(max_size=5)
calls = st.builds(ToolCall, st.text(max_size=5), st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3)), maybe)
messages = st.builds(
    Message,
    role=st.sampled_from(ROLES),
    content=st.text(max_size=9),
    loss=st.just(False),
    thinking=maybe,
    tool_calls=st.lists(calls, max_size=2).map(tuple),
    name=maybe,
    tool_call_id=maybe,
)


@given(messages)
def test_a_message_comes_back(message: Message) -> None:
    assert Message.from_dict(message.as_dict()) == message
