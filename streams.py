"""Streams of logs: routine lines, the few incidents among them, and later lines that come back to an incident.

    python streams.py --lines 200000 --seed 1 -o build/stream.txt      plain text, for `train.py --dataset`
    python streams.py --lines 1000 --machine                           with lines of this machine's own logs between

A stream is a function of its seed. Several hosts and services speak in turns and in bursts. An incident carries an id
and details (source, session, account, port). A report, later, names the id and gives one of them again, each at most
once, so that nothing but the incident holds it; now and then a report is about a routine line. Ids, sessions, accounts
and addresses of streams for testing are none of training's, by a hash of their text, and every line has an id, so that
no line is in both. Some templates of incidents (`UNSEEN`) are never in training.
"""

import gzip
import heapq
import re
import sys
from collections import deque
from itertools import count, islice
from pathlib import Path
from random import Random
from types import ModuleType
from typing import NamedTuple
from zlib import crc32

if "hspmn" not in sys.modules:  # run as a script: this checkout is the package, whatever its folder is called
    sys.modules["hspmn"] = ModuleType("hspmn")
    sys.modules["hspmn"].__path__ = [str(Path(__file__).resolve().parent)]

from hspmn.results import SEED, Parser, at_least, refusing

ROUTINE = {  # templates of each service; a name in braces is drawn by `LogStream`
    "nginx": (
        "INFO GET /{page} status=200 bytes={bytes} src={src} req={id}",
        "INFO GET /static/{page}.css status=304 src={src} req={id}",
        "INFO POST /api/{page} status=201 ms={ms} src={src} req={id}",
        "WARN upstream slow ms={ms} path=/{page} src={src} req={id}",
    ),
    "shop": (
        "INFO order req={id} user={user} items={small} session={session}",
        "INFO payment accepted req={id} user={user} session={session} ms={ms}",
        "DEBUG cache hit key={page} req={id} ms={ms}",
        "ERROR retry {small} of 5 calling billing req={id} session={session}",
    ),
    "sshd": (
        "INFO accepted publickey user={user} src={src} port={port} req={id}",
        "INFO session opened user={user} session={session} req={id}",
        "INFO session closed user={user} session={session} req={id}",
        "NOTICE failed password user={user} src={src} port={port} req={id}",
    ),
    "kernel": (
        "INFO eth{small} link up 1000 Mbps seq={id}",
        "INFO usb {small} new device number={port} seq={id}",
        "WARN cpu{small} temperature above threshold seq={id}",
        "INFO nf_conntrack drop src={src} dpt={port} seq={id}",
    ),
    "cron": (
        "INFO backup of /{page} done bytes={bytes} job={id}",
        "INFO rotate /var/log/{page} ms={ms} job={id}",
    ),
}  # fmt: skip
INCIDENTS = {  # service and template of each kind, the frequent ones first; every detail is a field that can be asked
    "sql_injection": ("nginx", "ALERT SQL_INJECTION {sql} id={id} src={src} session={session}"),
    "brute_force": ("sshd", "ALERT BRUTE_FORCE {small} accounts id={id} src={src} user={user}"),
    "path_traversal": ("nginx", "ALERT PATH_TRAVERSAL {traversal} id={id} src={src} port={port}"),
    "privilege": ("kernel", "CRIT PRIVILEGE_ESCALATION setuid id={id} user={user} session={session}"),
    "malware": ("shop", "CRIT MALWARE upload {page}.exe id={id} session={session} src={src}"),
    "exfiltration": ("kernel", "CRIT EXFILTRATION bytes={bytes} id={id} src={src} port={port}"),
    "token_theft": ("shop", "ALERT TOKEN_REPLAY id={id} session={session} user={user}"),
    "oom": ("kernel", "EMERG OUT_OF_MEMORY killed {page} id={id} port={port} session={session}"),
    "disk": ("kernel", "CRIT DISK_FAILURE sector={bytes} id={id} port={port} user={user}"),
    "fraud": ("shop", "ALERT PAYMENT_FRAUD amount={bytes} id={id} user={user} src={src}"),
    "rootkit": ("kernel", "EMERG ROOTKIT module {page} id={id} user={user} port={port}"),
    "key_leak": ("sshd", "CRIT PRIVATE_KEY_LEAKED id={id} user={user} src={src}"),
    "xss": ("nginx", "ALERT CROSS_SITE_SCRIPT {script} id={id} src={src} session={session}"),
    "ransom": ("shop", "EMERG FILES_ENCRYPTED count={bytes} id={id} session={session} port={port}"),
    "dns_tunnel": ("kernel", "CRIT DNS_TUNNEL {page}.example id={id} src={src} user={user}"),
    "replayed_login": ("sshd", "ALERT IMPOSSIBLE_TRAVEL id={id} user={user} session={session}"),
}  # fmt: skip
UNSEEN = ("xss", "ransom", "dns_tunnel", "replayed_login")  # kinds of incidents that training never shows
SEEN = tuple(kind for kind in INCIDENTS if kind not in UNSEEN)
DETAILS = ("src", "session", "user", "port")
WORDS = {
    "page": "cart login search profile images about news help docs status users items prices map feed album",
    "name": "alice bruno chen dara emil farah goran hana ivan jana kofi lena mateo nadia oleg priya rosa sven tara",
    "sql": "' OR 1=1 -- |1; DROP TABLE users|UNION SELECT password FROM users|' AND SLEEP(9) --",
    "traversal": "../../etc/passwd|..%2f..%2fetc/shadow|....//boot.ini|/proc/self/environ",
    "script": "<script>alert(1)</script>|<img onerror=steal()>|javascript:fetch(cookie)|<svg onload=go()>",
}  # fmt: skip
WORDS = {name: text.split("|" if "|" in text else " ") for name, text in WORDS.items()}
SYLLABLES = [consonant + vowel for consonant in "BDFGKLMNPRSTVZ" for vowel in "AEIOU"]
HOSTS = [f"{role}{number:02}" for role in ("web", "app", "db", "edge") for number in range(1, 9)]
SPEAKERS, BURST = 4, 6  # hosts that speak at a time, and lines that one of them says on average
ROUTINE_ASKED = 0.02  # reports about routine lines per report about an incident, about
ALIKE = 0.5  # share of ids that differ from an earlier one in one digit
FIELD = re.compile(r"\{(\w+)\}")
MACHINE_LOGS = ("/var/log/dpkg.log*", "/var/log/apt/history.log*", "/var/log/alternatives.log*", "/var/log/syslog*")


class Line(NamedTuple):
    """A line of a stream. text: with its line end. label: "routine", "incident", "report", or "other" for text of
    unknown worth. kind: of `INCIDENTS`, or the service. id and details: what a report may ask about the line, name to
    value; of a report, the id it names and what it gives, which begins at character `given`."""

    text: str
    label: str
    kind: str
    id: str = ""
    details: dict = {}
    given: int | None = None


class LogStream:
    """Endless lines.

    seed: any text or number. test: whether values and kinds of incidents are those of testing. every: lines per
    incident, at least 1. asked: share of the details of incidents that a report gives again. lag: lines between an
    incident and a report at most, drawn evenly in their logarithm. machine: lines of other logs, of which some follow
    now and then. renamed: share of incidents whose name is made up, so that a model cannot know incidents by name.
    """

    def __init__(self, seed, test=False, every=50, asked=1.0, lag=1000, machine=(), renamed=0.0):
        self.random, self.test, self.every, self.asked, self.lag = Random(f"{seed}"), test, every, asked, lag
        self.renamed = renamed
        self.machine, self.seconds = machine, self.random.randrange(86400)
        self.recent, self.named = deque(maxlen=64), set()  # ids of the last lines, and of all incidents
        self.speakers = [self._speaker() for _ in range(SPEAKERS)]
        kinds = INCIDENTS if test else SEEN
        self.kinds, self.weights = list(kinds), [1 / place for place, _ in enumerate(kinds, 1)]

    def _speaker(self):
        return [self.random.choice(HOSTS), self.random.choice([*ROUTINE]), 1 + int(self.random.expovariate(1 / BURST))]

    def _own(self, draw):
        """The first text drawn that belongs to the side of this stream."""
        while crc32((text := draw()).encode()) & 1 != self.test:
            pass
        return text

    def _id(self):
        """Nine digits: many ids are an earlier one but for a digit, so that no part of an id tells it from others."""
        text = f"{self.random.randrange(10**9):09}"
        if self.recent and self.random.random() < ALIKE:
            old, place = self.random.choice(self.recent), self.random.randrange(9)
            text = f"{old[:place]}{text[place]}{old[place + 1 :]}"
        return self._id() if text in self.recent or text in self.named else text

    def _value(self, field):
        random = self.random
        if field == "id":
            self.recent.append(self._own(self._id))
            return self.recent[-1]
        if field == "src":
            return self._own(lambda: ".".join(f"{random.randrange(1, 255)}" for _ in range(4)))
        if field == "session":
            return self._own(lambda: f"{random.randrange(10**6):06}")
        if field == "user":
            return self._own(lambda: f"{random.choice(WORDS['name'])}{random.randrange(1000):03}")
        if field == "port":
            return self._own(lambda: f"{random.randrange(1024, 65536)}")
        if field in WORDS:
            return random.choice(WORDS[field])
        return f"{random.randrange({'small': 8, 'ms': 900, 'bytes': 10**5}[field])}"

    def _head(self, host, service):
        self.seconds = (self.seconds + self.random.randrange(3)) % 86400
        minutes, seconds = divmod(self.seconds, 60)
        return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02} {host} {service}: "

    def _line(self, host, service, template, label, kind):
        head, values = self._head(host, service), {field: self._value(field) for field in FIELD.findall(template)}
        details = {field: values[field] for field in DETAILS if field in values}
        return Line(f"{head}{template.format(**values)}\n", label, kind, values["id"], details)

    def routine(self):
        """The next routine `Line`."""
        place = self.random.randrange(SPEAKERS)
        host, service, left = self.speakers[place]
        self.speakers[place] = [host, service, left - 1] if left > 1 else self._speaker()
        return self._line(host, service, self.random.choice(ROUTINE[service]), "routine", service)

    def incident(self, kind=None):
        """The `Line` of an incident, of a given kind or one drawn by how frequent it is."""
        kind = kind or self.random.choices(self.kinds, self.weights)[0]
        service, template = INCIDENTS[kind]
        if self.random.random() < self.renamed:
            severity, _, rest = template.split(" ", 2)
            name = "_".join("".join(self.random.choices(SYLLABLES, k=self.random.randrange(1, 4))) for _ in range(2))
            template = f"{severity} {name} {rest}"
        line = self._line(self.random.choice(HOSTS), service, template, "incident", kind)
        self.named.add(line.id)
        return line

    def report(self, line, field=None):
        """A later `Line` that names the id of `line` and gives one of its details, by default any."""
        field = field or self.random.choice([*line.details])
        text, value = f"{self._head('soc01', 'audit')}report id={line.id} {field}=", line.details[field]
        return Line(f"{text}{value}\n", "report", line.kind, line.id, {field: value}, len(text))

    def __iter__(self):
        due, random = [], self.random  # reports: the number of the line before which each stands, and what it gives
        for number in count():
            if due and due[0][0] <= number:
                yield self.report(*heapq.heappop(due)[2:])
                continue
            if self.machine and random.random() < 1 / 200:
                begin = random.randrange(len(self.machine))
                for text in self.machine[begin : begin + 20]:
                    yield Line(text, "other", "machine")
            incident = random.random() < 1 / self.every
            line = self.incident() if incident else self.routine()
            yield line
            asked = self.asked if incident else self.asked * ROUTINE_ASKED / self.every
            for again, field in enumerate(line.details):
                if random.random() < asked:
                    before = number + 1 + int(self.lag ** random.random())
                    heapq.heappush(due, (before, 2 * number + again, line, field))


def machine_logs():
    """Lines of the logs that this machine keeps and lets be read; none on a machine without."""
    lines = []
    for pattern in MACHINE_LOGS:
        for path in sorted(Path("/").glob(pattern[1:])):
            try:
                data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            except OSError:
                continue
            lines += data.decode(errors="replace").splitlines(keepends=True)
    return [line for line in lines if line.strip()]


def main(argv=None):
    """Write a stream; returns the exit code."""
    parser = Parser("streams.py", __doc__)
    add = parser.add_argument
    add("--lines", type=at_least(1), default=10_000, help="lines to write")
    add("--seed", type=SEED, default=0)
    add("--every", type=at_least(1, most=10**9), default=50, help="lines per incident")
    add("--lag", type=at_least(1), default=1000, help="lines between an incident and its report at most")
    add("--test", action="store_true", help="values and kinds of incidents of testing, not of training")
    add("--machine", action="store_true", help="with lines of this machine's own logs between")
    add("-o", "--output", type=Path, help="file; standard output by default")
    args = parser.parse(argv, {})
    stream = LogStream(args.seed, args.test, args.every, 1.0, args.lag, machine_logs() if args.machine else ())
    lines = (line.text for line in islice(stream, args.lines))
    with refusing():
        if args.output is None:
            sys.stdout.writelines(lines)
            return 0
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with open(args.output, "w", encoding="utf-8") as file:
            file.writelines(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
