"""Beginnings of texts that a model goes on with when its head is calibrated.

Keys are kinds of text. Those that begin with "chat" are a user's messages, the others
the first words of a text.
"""

PROMPTS = {
    "story": (
        "On the last evening of the summer fair, the puppet maker",
        "My grandmother used to say that a house remembers. When I",
    ),
    "science": (
        "Photosynthesis turns light into chemical energy. In the first step,",
        "Black holes form when a massive star",
    ),
    "news": (
        "BRUSSELS - Ministers failed on Friday to agree on",
        "Shares of the car maker fell by six percent after",
    ),
    "history": ("In 1492 the fleet of Columbus", "The printing press changed"),
    "review": ("I have owned this blender for a year now, and", "The film is slow but"),
    "chat_question": (
        "Why is the sky blue?",
        "What is the capital of Australia, and why is it not Sydney?",
        "How can I sleep better?",
        "Explain inflation to a ten-year-old.",
    ),
    "chat_program": (
        "Write a Python function that merges two sorted lists.",
        "How do I undo the last commit in git?",
        "What does the map function do in JavaScript?",
    ),
    "chat_arithmetic": (
        "What is 36 plus 78, minus 19?",
        "A shirt costs 40 euros and is reduced by 15 percent. What does it cost?",
    ),
    "markdown": (
        "# How to brew coffee\n\n## What you need\n\n",
        "## Usage\n\n```python\nfrom",
    ),
    "python": (
        "import re\n\n\ndef count_words(text):\n",
        "from dataclasses import dataclass\n\n\n@dataclass\nclass Point:\n",
        "with open(path) as file:\n    for line in file:\n",
    ),
    "javascript": (
        "async function fetchUser(id) {\n  const response = await",
        "const total = items.filter((item) =>",
    ),
    "c": (
        "#include <stdio.h>\n\nint main(void) {\n",
        "static int compare(const void *",
    ),
    "html": ('<div class="card">\n  <h2>', "body {\n  margin: 0;\n  font-family:"),
    "latex": ("\\begin{theorem}\nLet $G$ be a finite group", "The integral $\\int_0^1"),
    "french": (
        "Hier matin, en sortant de la boulangerie,",
        "La Loire est le plus long",
    ),
    "german": ("Als der Zug endlich ankam,", "Die Donau fließt durch"),
    "italian": ("Quando aprì la finestra,", "La pasta si cuoce in"),
    "portuguese": ("O menino correu até a praia e", "A língua portuguesa é falada"),
    "chinese": ("今天天气很好，", "长江是亚洲最长的河流，"),
    "hindi": ("गंगा नदी भारत की", "सुबह होते ही वह"),
    "korean": ("한국의 전통 음식은", "어느 날 한 소년이"),
    "configuration": ("version: '3'\nservices:\n", "<settings>\n  <option name="),
    "recipe": (
        "Pumpkin soup\n\nIngredients:\n- 1",
        "Beat the eggs with the sugar until",
    ),
    "letter": ("Dear neighbours,\n\nwe would like to", "Hi Sam,\n\nthanks for"),
}
