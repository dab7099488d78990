"""Beginnings of texts that a model continues, to judge retrieval by.

Keys as in ``mlx_flashhead.calibration.prompts``. No kind and no language is in both, so
that recall on these is recall on text of another sort than was calibrated on.
"""

PROMPTS = {
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
