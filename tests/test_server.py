"""SmolLM2, converted, behind mlx-lm's server, asked by the openai client."""

import real_model


def test_server_answers_the_openai_client(smollm2_flashhead):
    real_model.check_server(smollm2_flashhead)
