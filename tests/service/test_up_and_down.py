from flows.service import Service, is_healthy


def test_up(service: Service) -> None:
    assert is_healthy(service)
