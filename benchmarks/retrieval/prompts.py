"""Beginnings of texts that a model continues; no kind is in both sets.

Keys are kinds of text. Those that begin with "chat" are a user's messages, the others
the first words of a text. Calibration and test differ in kinds and in languages, so
that recall on the test set is recall on text of another sort than was measured.
"""

CALIBRATION = {
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

TEST = {
    "sql": (
        "SELECT department, AVG(salary)\nFROM",
        "UPDATE orders\nSET status =",
        "CREATE INDEX idx_user ON",
    ),
    "rust": (
        "fn read_lines(path: &str) -> Result<Vec<String>, io::Error> {\n",
        "#[derive(Debug, Clone)]\nstruct Matrix {\n",
        "match self.state {\n    State::Idle =>",
    ),
    "go": (
        "func main() {\n\tch := make(chan int)\n",
        "type Cache struct {\n\tmu sync.Mutex\n",
    ),
    "java": (
        "public interface Shape {\n    double area();\n",
        "List<String> names = people.stream()\n    .map(",
        "try {\n    connection = DriverManager.getConnection(url);\n",
    ),
    "shell": (
        "#!/bin/bash\nset -e\n\nfor file in",
        "$ ls -l\ntotal 24\n-rw-r--r-- 1",
        'if [ -z "$1" ]; then\n  echo',
    ),
    "json": (
        '{"order": {"id": 7731, "items": [{"sku":',
        '[\n  {"name": "Oslo", "lat": 59.91, "lon":',
        '{\n  "name": "my-package",\n  "version":',
    ),
    "log": (
        "Jan 12 08:14:55 web01 sshd[2211]:",
        "Traceback (most recent call last):\n  File",
        "[WARN] 12:00:01 retrying request 3 of 5\n[WARN]",
    ),
    "table": (
        "| Country | Population | Area (km2) |\n|---|---|---|\n| Chile |",
        "date,open,high,low,close\n2023-01-03,",
        "Rank  Team        Points\n1     ",
    ),
    "list": (
        "Ten animals that live in the desert:\n1.",
        "Shopping list\n- milk\n-",
        "Words that rhyme with light: night,",
        "Agenda for Monday:\n\n*",
    ),
    "chat_story": (
        "Tell me a bedtime story about a fox and a train.",
        "You are a museum guide. Show me the room with the mummies.",
        "Invent a sport that is played on ice with umbrellas.",
    ),
    "chat_help": (
        "My plant has yellow leaves. What should I do?",
        "How do I ask my boss for a day off?",
        "Plan a weekend in Lisbon for two people.",
        "I have eggs, rice and spinach. What can I cook?",
    ),
    "chat_rewrite": (
        "Correct the mistakes: 'He don't has no time for goes there.'",
        "Make this shorter: The weather was so bad that day that all of us who had "
        "planned to go to the lake decided in the end to stay at home.",
        "Translate to German: I would like a cup of tea.",
    ),
    "chat_opinion": (
        "Is it better to rent or to buy a flat?",
        "Compare trains and planes for a trip of 600 km.",
        "Should schools ban phones?",
    ),
    "spanish": (
        "Cuando llegó el invierno, los pastores",
        "El río Amazonas nace en",
        "Me gustaría saber cómo",
    ),
    "dutch": ("Gisteren liep ik door het park en", "Amsterdam staat bekend om"),
    "swedish": ("På morgonen gick hon ner till sjön och", "Sveriges huvudstad är"),
    "polish": ("Wisła jest najdłuższą rzeką", "W małym domku nad morzem"),
    "russian": (
        "Старый мост через реку",
        "Волга впадает в",
        "Утром дети побежали",
    ),
    "greek": ("Η Αθήνα είναι", "Μια φορά κι έναν καιρό"),
    "japanese": ("富士山は日本で", "雨の日に、小さな犬が"),
    "arabic": ("نهر النيل هو", "ذهب الولد إلى المدرسة و"),
    "turkish": ("Ankara, Türkiye'nin", "Yağmur başlayınca çocuklar"),
    "poem": (
        "The moon has left her silver shoes\nBeside the",
        "Autumn leaves are falling,\n",
        "O captain of the paper boat,",
    ),
    "law": (
        "Article 5. The parties agree that any dispute",
        "The licensee may not sublicense",
        "In the case of Miller v. the City, the court held",
    ),
    "dialogue": (
        "Anna: Did you feed the cat?\nBen:",
        "Reporter: How do you explain the defeat?\nCoach:",
        '"Put it down," she whispered. "',
    ),
    "biography": (
        "Nikola Tesla was born in",
        "She studied medicine in Vienna before",
        "The painter spent his youth in",
    ),
    "medicine": (
        "Symptoms of pneumonia include",
        "A 54-year-old woman presented with chest pain and",
        "The recommended dose for adults is",
    ),
    "geography": (
        "The Sahara covers most of",
        "Mount Kilimanjaro rises",
        "New Zealand consists of two",
    ),
    "guide": (
        "To change a bicycle tube, first",
        "Before you paint a wall,",
        "Step 1: Turn off the power. Step 2:",
    ),
    "post": (
        "can't believe it's already december",
        "Hot take: pineapple on pizza",
        "Just finished my first marathon!",
    ),
}
