from flows.service import Service, _is_healthy


def test_up(service: Service) -> None:
    assert _is_healthy(service)
