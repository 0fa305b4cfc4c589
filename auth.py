"""Who is calling and what they may do.

A person signs in with a password or a one-time link and carries a token; a server carries its key;
a session carries its own key, which is never stored: it is the session's id signed with the hub's
secret, so it can be said again after a restart and dies with the session.
"""

import hashlib
import hmac
import os
import secrets
import threading
import time
from base64 import urlsafe_b64encode
from collections import OrderedDict, deque
from dataclasses import dataclass, field, replace
from pathlib import Path

from werkzeug.security import check_password_hash, generate_password_hash

from models import (
    UNHEARD,
    Conflict,
    Forbidden,
    Invalid,
    Membership,
    NotFound,
    Project,
    Registration,
    Server,
    Token,
    TooMany,
    Unauthorised,
    UnusableData,
    User,
    clock,
    execute,
    iso,
    offloop,
    one,
    private,
    rows,
    sync_folder,
    transaction,
)

# ── rights ────────────────────────────────────────────────────────────────────────────────────

ROLES = ("viewer", "operator", "admin")
VIEWER = frozenset({"read", "session.watch"})
TASK_WORK = frozenset({"task.create", "task.change"})
OPERATOR = VIEWER | TASK_WORK | {
    "task.report",
    "contract.amend",
    "session.open",
    "session.type",
    "session.close",
    "permission.decide",
}  # fmt: skip
ADMIN = OPERATOR | {"server.token", "server.admin", "project.admin", "rule.admin"}

# What each credential may do within its projects; `report_allowed` narrows task.report further.
RIGHTS = {
    "viewer": VIEWER,
    "operator": OPERATOR,
    "admin": ADMIN,
    "server": frozenset({"read", "task.report"}) | TASK_WORK,
    "worker": frozenset({"read", "task.report"}),
    "plain": frozenset({"read", "task.report"}),
    "orchestrator": frozenset({"read", "task.report", "session.watch"}) | TASK_WORK,
}
HUB_ADMIN_ONLY = frozenset({"user.admin", "project.create", "rule.all"})


@dataclass(frozen=True)
class Caller:
    """Whoever makes a request.

    kind: user, server, session or hub. roles: {project_id: key of RIGHTS}; a hub admin and the
    hub itself need none. session_id, task_id, attempt: of a session key. token_id: of a person.
    key_hash: of a server, the key it has shown. where: how people are told they came, such as
    "on the dashboard".
    """

    kind: str
    id: str
    name: str
    is_admin: bool = False
    roles: dict = field(default_factory=dict)
    server_id: str | None = None
    session_id: str | None = None
    task_id: str | None = None
    attempt: int | None = None
    token_id: str | None = None
    key_hash: str | None = None
    where: str | None = None

    @property
    def actor(self) -> str:
        """The caller as the event log names it."""
        return self.name if self.kind in ("user", "hub") else f"{self.kind}:{self.name}"

    @property
    def project_id(self) -> str | None:
        return next(iter(self.roles)) if self.kind in ("server", "session") else None


HUB = Caller("hub", "hub", "hub", is_admin=True)


def can(caller: Caller, action: str, project_id: str | None = None) -> bool:
    """Whether `caller` may do `action` in the project; the one place that knows."""
    if caller.is_admin:
        return True
    if action in HUB_ADMIN_ONLY or project_id is None:
        return False
    return action in RIGHTS.get(caller.roles.get(project_id), ())


def require(caller: Caller, action: str, project_id: str | None = None, what: str = "it") -> None:
    """Raise Forbidden unless allowed, or NotFound when the caller may not even see the project."""
    if can(caller, action, project_id):
        return
    if project_id is not None and not can(caller, "read", project_id):
        raise NotFound(f"No such {what}, or it is not visible to you.")
    raise Forbidden(
        f"{caller.name} may not do this ({action}): ask an admin of the project for the role.",
        action=action,
    )


def report_allowed(caller: Caller, task: dict, server_id: str | None) -> bool:
    """Keys report on their own work only: a server's on what is or was on it (`server_id`, of the
    attempt reported on), a session's on its task."""
    if caller.kind == "server":
        return server_id == caller.server_id
    if caller.kind == "session":
        return caller.session_id == task["session_id"] or caller.task_id == task["id"]
    return True


def visible_projects(caller: Caller) -> list[dict]:
    """[{id, name, …, role}] the caller can see, by name."""
    found = rows("SELECT * FROM project ORDER BY name")
    role = {p["id"]: "admin" if caller.is_admin else caller.roles.get(p["id"]) for p in found}
    return [p | {"role": role[p["id"]]} for p in found if role[p["id"]]]


def pick_project(caller: Caller, given: str | None) -> dict:
    """The project meant: by id, unique id prefix or name, or the only one visible.

    Raises NotFound or Invalid.
    """
    projects = visible_projects(caller)
    if given:
        exact = [p for p in projects if p["id"] == given or p["name"].lower() == given.lower()]
        found = exact or [p for p in projects if p["id"].startswith(given.lower())]
        if len(found) == 1:
            return found[0]
        raise NotFound(f"No project {given!r} is visible to you; `project list` shows them.")
    if len(projects) == 1:
        return projects[0]
    if not projects:
        raise NotFound("There is no project visible to you yet; create one first.")
    raise Invalid(
        "Several projects are visible to you: say which one with project_id.",
        candidates=[{"id": p["id"], "name": p["name"]} for p in projects],
    )


# ── secrets ───────────────────────────────────────────────────────────────────────────────────

_secret = b""


SECRET_BYTES = 32


def use_secret(path: Path) -> None:
    """Load the hub's secret (random bytes in a 0600 file of their own), making it once.

    It is there whole or not at all, whenever the process or the power dies: with an empty one
    anybody could make keys. Raises UnusableData for one that is not whole.
    """
    global _secret
    if not path.exists():
        _make_secret(path)
    found = path.read_bytes()
    if len(found) != SECRET_BYTES:
        raise UnusableData(
            f"{path} has {len(found)} bytes in place of {SECRET_BYTES}: put the one of a backup "
            "there, or remove it, which ends the keys of all sessions that run."
        )
    _secret = found


def _make_secret(path: Path) -> None:
    whole = path.with_name(f"{path.name}.new")
    with open(whole, "wb", opener=private) as file:
        file.write(secrets.token_bytes(SECRET_BYTES))
        file.flush()
        os.fsync(file.fileno())
    whole.rename(path)
    sync_folder(path.parent)


def digest(secret: str) -> str:
    """How a token or key is stored. SHA-256 suffices: each has 256 bits of entropy."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _sign(purpose: str, value: str) -> str:
    mac = hmac.new(_secret, f"{purpose}:{value}".encode(), hashlib.sha256).digest()
    return urlsafe_b64encode(mac).decode().rstrip("=")


def session_key(session_id: str) -> str:
    return f"orcs_{session_id}.{_sign('session', session_id)}"


def _same(a: str, b: str) -> bool:
    return hmac.compare_digest(a.encode(), b.encode())


def csrf_token(token_id: str) -> str:
    """What a form of the person signed in with this token must bring along."""
    return _sign("csrf", token_id)


def csrf_matches(caller: Caller, given: str | None) -> bool:
    return bool(caller.token_id) and _same(csrf_token(caller.token_id), given or "")


# ── recognising a caller ──────────────────────────────────────────────────────────────────────


def by_token(secret: str) -> Caller:
    """The person behind a token of kind api or web. Raises Unauthorised."""
    return _person("t.hash = ? AND t.kind IN ('api', 'web')", digest(secret))


def by_token_id(token_id: str) -> Caller:
    """The person who has signed in, or is paired, by this token. Raises Unauthorised."""
    return _person("t.id = ? AND t.kind <> 'link'", token_id)


def _person(condition: str, value: str) -> Caller:
    found = one(
        "SELECT t.id AS token_id, t.expires_at, u.id, u.username, u.is_admin, u.disabled"
        f" FROM token t JOIN user u ON u.id = t.user_id WHERE {condition}",
        (value,),
    )
    if not found or found["expires_at"] < clock.latest() or found["disabled"]:
        raise Unauthorised("This token is not valid (any more): sign in again.")
    memberships = rows("SELECT project_id, role FROM membership WHERE user_id = ?", (found["id"],))
    return Caller(
        "user",
        found["id"],
        found["username"],
        is_admin=bool(found["is_admin"]),
        roles={m["project_id"]: m["role"] for m in memberships},
        token_id=found["token_id"],
    )


def by_key(key: str) -> Caller:
    """The server or session behind an X-API-Key. Raises Unauthorised."""
    if key.startswith("orcs_"):
        return _by_session_key(key)
    found = one(
        "SELECT id, name, project_id FROM server WHERE key_hash = ? AND revoked = 0",
        (digest(key),),
    )
    if not found:
        raise Unauthorised(
            "This server key is not valid: the server was revoked or registered anew. "
            "Register it with a new token."
        )
    return Caller(
        "server",
        found["id"],
        found["name"],
        roles={found["project_id"]: "server"},
        server_id=found["id"],
        key_hash=digest(key),
    )


def _by_session_key(key: str) -> Caller:
    session_id = key[5:].partition(".")[0]
    found = None
    if _same(session_key(session_id), key):
        found = one(
            f"SELECT s.*, v.revoked, s.server_id IN {UNHEARD} AS unheard"
            " FROM session s JOIN server v ON v.id = s.server_id WHERE s.id = ?",
            (session_id,),
        )
    if not found or found["revoked"] or found["state"] in ("closed", "failed"):
        raise Unauthorised("This session key is not valid: its session has ended.")
    if found["state"] == "lost":
        raise Unauthorised(
            "This session key is not valid: its server does not have the session any more. It "
            "works again should the session turn up."
        )
    if found["unheard"]:
        raise Unauthorised(
            "The hub was restored from a backup and does not know yet whether this session goes "
            "on: try again once its server has connected.",
            code="restored",
        )
    return Caller(
        "session",
        found["id"],
        found["name"],
        roles={found["project_id"]: found["role"]},
        server_id=found["server_id"],
        session_id=found["id"],
        task_id=found["task_id"],
        attempt=found["attempt"],
    )


def again(caller: Caller) -> Caller | None:
    """The same caller as they stand now; None when they may not call any more."""
    try:
        if caller.kind == "user":
            return replace(by_token_id(caller.token_id), where=caller.where)
        if caller.kind == "session":
            return _by_session_key(session_key(caller.session_id))
        found = one("SELECT key_hash FROM server WHERE id = ? AND revoked = 0", (caller.id,))
        return caller if found and found["key_hash"] == caller.key_hash else None
    except Unauthorised:
        return None


# ── people ────────────────────────────────────────────────────────────────────────────────────

TOKENS_SHOWN = 100
TOKEN_DAYS = {"api": 90, "web": 14, "telegram": 3650}  # a pairing ends when somebody ends it
LOGIN_LINK_S = 3600
PASSWORD_LENGTH = 8
# Tries within the window before a pause: for one account from one address, and for one address.
TRIES, TRIES_OF_ADDRESS, TRIES_WINDOW_S = 5, 50, 60.0
TRIES_KEPT = 10_000  # accounts and addresses remembered; the oldest go first
NAME_MOST, PASSWORD_MOST = 200, 1000
_NOBODY = generate_password_hash(secrets.token_hex(16))
_wrong: OrderedDict[tuple, deque] = OrderedDict()
_wrong_lock = threading.Lock()


def count_try(who: tuple, most: int, now: float, what: str = "passwords") -> None:
    """Count a try before it is looked at, so that many at once do not slip through.

    who: whatever is to be told apart. now: time.monotonic(). Raises TooMany.
    """
    with _wrong_lock:
        tries = _wrong.setdefault(who, deque(maxlen=most))
        if len(tries) == most and now - tries[0] < TRIES_WINDOW_S:
            wait = int(TRIES_WINDOW_S - (now - tries[0])) + 1
            raise TooMany(f"Too many wrong {what}: wait {wait} s and try again.", retry_after=wait)
        tries.append(now)
        _wrong.move_to_end(who)
        while len(_wrong) > TRIES_KEPT:
            _wrong.popitem(last=False)


def _begin_try(username: str, address: str) -> tuple[tuple, tuple]:
    """Count a try at a password; what `_forgive` needs when it is right. Raises TooMany."""
    now, account, place = time.monotonic(), (username.lower(), address), (None, address)
    count_try(place, TRIES_OF_ADDRESS, now)
    count_try(account, TRIES, now)
    return account, place


def _forgive(account: tuple, address: tuple) -> None:
    with _wrong_lock:
        _wrong.pop(account, None)
        if _wrong.get(address):
            _wrong[address].pop()


def login(username: str, password: str, address: str = "", kind: str = "api") -> tuple[str, dict]:
    """Return (token, user) for the right password. Raises Unauthorised or TooMany."""
    if len(username) > NAME_MOST or len(password) > PASSWORD_MOST:
        raise Unauthorised("User name or password is wrong.", code="wrong_password")
    account, place = _begin_try(username, address)
    user = one("SELECT * FROM user WHERE username = ?", (username,))
    stored = (user or {}).get("password_hash") or _NOBODY  # the same work for unknown names
    right = offloop(check_password_hash, stored, password)
    if not (user and right and not user["disabled"] and user["password_hash"]):
        raise Unauthorised("User name or password is wrong.", code="wrong_password")
    _forgive(account, place)
    with transaction():
        return issue(user["id"], kind), user_json(user)


def login_with_link(secret: str, kind: str = "web") -> tuple[str, dict]:
    """Exchange a one-time login token for a token. Raises Unauthorised."""
    with transaction():
        user = one(
            "UPDATE token SET used_at = ? WHERE hash = ? AND kind = 'link' AND used_at IS NULL"
            " AND expires_at > ? RETURNING user_id",
            (time.time(), digest(secret), clock.latest()),
        )
        user = user and one("SELECT * FROM user WHERE id = ? AND disabled = 0", (user["user_id"],))
        if not user:
            raise Unauthorised(
                "This login link was used or has expired: make a new one with "
                "`python hub.py --login-link`."
            )
        return issue(user["id"], kind), user_json(user)


def issue(user_id: str, kind: str, name: str = "") -> str:
    """Make a token of `kind` (api, web, link) for a user; it is shown this once."""
    secret = f"orct_{secrets.token_urlsafe(32)}"
    life = LOGIN_LINK_S if kind == "link" else TOKEN_DAYS[kind] * 86400
    Token.create(
        user_id=user_id, kind=kind, name=name, hash=digest(secret), expires_at=clock.latest() + life
    )
    return secret


# ── one's own account ─────────────────────────────────────────────────────────────────────────


def own_tokens(caller: Caller) -> list[dict]:
    """What the caller is signed in with, newest first: {id, kind, name, created_at, expires_at,
    current}. Raises Forbidden for who is no person."""
    _require_person(caller)
    return [
        {
            "id": row["id"],
            "kind": row["kind"],
            "name": row["name"],
            "created_at": iso(row["created_at"]),
            "expires_at": iso(row["expires_at"]),
            "current": row["id"] == caller.token_id,
        }
        for row in rows(
            "SELECT * FROM token WHERE user_id = ? AND kind <> 'link' AND expires_at > ?"
            " ORDER BY created_at DESC, id LIMIT ?",
            (caller.id, time.time(), TOKENS_SHOWN),
        )
    ]


def _require_person(caller: Caller) -> None:
    if caller.kind != "user":
        raise Forbidden("Only people have an account: sign in.")


def new_token(caller: Caller, name: str) -> str:
    """A token for the caller's programs; it is shown this once. Raises Invalid, Forbidden."""
    _require_person(caller)
    if not name.strip():
        raise Invalid("A token needs a name, so that you know it again.", field="name")
    with transaction():
        return issue(caller.id, "api", name.strip())


def end_token(caller: Caller, token_id: str) -> None:
    """End one of the caller's own tokens. Raises NotFound."""
    _require_person(caller)
    with transaction() as tx:
        if not rows(
            "DELETE FROM token WHERE id = ? AND user_id = ? RETURNING id", (token_id, caller.id)
        ):
            raise NotFound("There is no such token of yours: it may have ended already.")
        tx.tell("access")


def end_other_tokens(caller: Caller) -> int:
    """Sign the caller out everywhere else; how many tokens that were."""
    _require_person(caller)
    with transaction() as tx:
        gone = rows(
            "DELETE FROM token WHERE user_id = ? AND id <> ? RETURNING id",
            (caller.id, caller.token_id),
        )
        tx.tell("access")
        return len(gone)


def change_own_password(caller: Caller, old: str, new: str, address: str = "") -> None:
    """Set the caller's password, and sign them out everywhere else.

    Raises Invalid for a wrong old one (who has none yet leaves it empty) and for a new one that is
    too short, TooMany.
    """
    _require_person(caller)
    account, place = _begin_try(caller.name, address)
    stored = one("SELECT password_hash FROM user WHERE id = ?", (caller.id,))["password_hash"]
    if stored and not offloop(check_password_hash, stored, old[:PASSWORD_MOST]):
        raise Invalid("The present password is wrong.", field="old")
    _forgive(account, place)
    hashed = hash_password(new)
    with transaction() as tx:
        User.update(password_hash=hashed).where(User.id == caller.id).execute()
        end_other_tokens(caller)
        tx.emit(
            "user_changed", None, caller.actor, {"username": caller.name, "changed": ["password"]}
        )


# ── all people ────────────────────────────────────────────────────────────────────────────────


def pair(user_id: str, name: str) -> str:
    """A token of kind telegram, inside the caller's transaction; its id. Its secret is not kept:
    nobody signs in with it, and whatever ends the user's other tokens ends it too."""
    life = TOKEN_DAYS["telegram"] * 86400
    made = Token.create(
        user_id=user_id,
        kind="telegram",
        name=name,
        hash=digest(secrets.token_urlsafe(32)),
        expires_at=clock.latest() + life,
    )
    return made.id


def logout(caller: Caller) -> None:
    with transaction() as tx:
        Token.delete().where(Token.id == caller.token_id).execute()
        tx.tell("access")


def forget_expired(now: float) -> None:
    """Delete tokens that ended over a day ago."""
    with transaction():
        execute("DELETE FROM token WHERE expires_at < ?", (now - 86400,))


def user_json(user: dict) -> dict:
    memberships = rows(
        "SELECT m.project_id, m.role, p.name FROM membership m"
        " JOIN project p ON p.id = m.project_id WHERE m.user_id = ?",
        (user["id"],),
    )
    return {
        "id": user["id"],
        "username": user["username"],
        "is_admin": bool(user["is_admin"]),
        "disabled": bool(user["disabled"]),
        "created_at": iso(user["created_at"]),
        "roles": {m["project_id"]: m["role"] for m in memberships},
        "projects": [
            {"id": m["project_id"], "name": m["name"], "role": m["role"]} for m in memberships
        ],
    }


def first_admin(password: str | None) -> str | None:
    """Make the user `admin` if there is no user yet; without a password, return a login token."""
    if one("SELECT 1 FROM user LIMIT 1"):
        return None
    hashed = hash_password(password) if password else None
    with transaction() as tx:
        admin = User.create(username="admin", password_hash=hashed, is_admin=True)
        tx.emit("user_created", None, "hub", {"username": "admin"})
        return None if password else issue(admin.id, "link")


def login_link(username: str = "admin") -> str:
    """A new one-time login token for a user who is not disabled. Raises NotFound."""
    user = one("SELECT * FROM user WHERE username = ? AND disabled = 0", (username,))
    if not user:
        raise NotFound(f"There is no user {username!r} who may sign in.")
    with transaction():
        return issue(user["id"], "link")


def hash_password(password: str) -> str:
    """Raises Invalid when the password is too short."""
    if len(password) < PASSWORD_LENGTH:
        raise Invalid(f"The password is too short: use at least {PASSWORD_LENGTH} characters.")
    return offloop(generate_password_hash, password)


def list_users(caller: Caller) -> list[dict]:
    require(caller, "user.admin")
    return [user_json(u) for u in rows("SELECT * FROM user ORDER BY username")]


def get_user(caller: Caller, name_or_id: str) -> dict:
    require(caller, "user.admin")
    found = one("SELECT * FROM user WHERE id = ? OR username = ?", (name_or_id, name_or_id))
    if not found:
        raise NotFound(f"There is no user {name_or_id!r}.")
    return found


def create_user(caller: Caller, username: str, password=None, is_admin=False, roles=None) -> dict:
    """Raises Conflict when the name is taken."""
    require(caller, "user.admin")
    hashed = hash_password(password) if password else None
    with transaction() as tx:
        if one("SELECT 1 FROM user WHERE username = ?", (username,)):
            raise Conflict(f"There is a user {username!r} already: choose another name.")
        user = User.create(username=username, password_hash=hashed, is_admin=is_admin)
        _set_roles(caller, user.id, roles or {})
        tx.emit("user_created", None, caller.actor, {"username": username})
    return user_json(get_user(caller, user.id))


def change_user(caller: Caller, name_or_id: str, changes: dict) -> dict:
    """Set password, is_admin, disabled or roles; ends the user's tokens where rights shrink."""
    user = get_user(caller, name_or_id)
    if user["id"] == caller.id and (changes.get("disabled") or changes.get("is_admin") is False):
        raise Conflict("You cannot take away your own access: let another admin do it.")
    password = changes.pop("password", None)
    if password:
        changes["password_hash"] = hash_password(password)
    roles = changes.pop("roles", None)
    with transaction() as tx:
        if changes:
            User.update(**changes).where(User.id == user["id"]).execute()
        if roles is not None:
            Membership.delete().where(Membership.user_id == user["id"]).execute()
            _set_roles(caller, user["id"], roles)
        if password or changes.get("disabled"):
            Token.delete().where(Token.user_id == user["id"]).execute()
        changed = sorted({*changes, *(["roles"] if roles is not None else [])})
        tx.emit(
            "user_changed", None, caller.actor, {"username": user["username"], "changed": changed}
        )
        tx.tell("access")
    return user_json(get_user(caller, user["id"]))


def delete_user(caller: Caller, name_or_id: str) -> None:
    user = get_user(caller, name_or_id)
    if user["id"] == caller.id:
        raise Conflict("You cannot delete yourself: let another admin do it.")
    with transaction() as tx:
        User.delete().where(User.id == user["id"]).execute()
        tx.emit("user_deleted", None, caller.actor, {"username": user["username"]})
        tx.tell("access")


def _set_roles(caller: Caller, user_id: str, roles: dict[str, str]) -> None:
    for project, role in roles.items():
        if role not in ROLES:
            raise Invalid(f"Unknown role {role!r}: use one of {', '.join(ROLES)}.")
        project_id = pick_project(caller, project)["id"]
        Membership.replace(user_id=user_id, project_id=project_id, role=role).execute()


def members(caller: Caller, project_ids: list[str]) -> dict[str, list[dict]]:
    """{project id: [{user_id, username, role}]} of the projects the caller may administer."""
    found = {p: [] for p in project_ids if can(caller, "project.admin", p)}
    for row in rows(
        "SELECT m.project_id, m.role, u.id, u.username FROM membership m JOIN user u"
        f" ON u.id = m.user_id WHERE m.project_id IN ({', '.join('?' * len(found))})"
        " ORDER BY u.username",
        list(found),
    ):
        one_of = {"user_id": row["id"], "username": row["username"], "role": row["role"]}
        found[row["project_id"]].append(one_of)
    return found


# ── projects ──────────────────────────────────────────────────────────────────────────────────


def create_project(caller: Caller, name: str, profile: str = "command") -> dict:
    """Raises Conflict when the name is taken."""
    require(caller, "project.create")
    with transaction() as tx:
        if one("SELECT 1 FROM project WHERE name = ?", (name,)):
            raise Conflict(f"There is a project {name!r} already: choose another name.")
        project = Project.create(name=name, profile=profile)
        tx.emit("project_created", project.id, caller.actor, {"name": name})
    return pick_project(caller, project.id)


# {setting of a project: what raises Invalid unless its value may be stored}
PROJECT_CHECKS: dict = {}


def change_project(caller: Caller, project_id: str, changes: dict) -> dict:
    """Raises Conflict when the name is taken, Invalid for a setting that cannot be."""
    require(caller, "project.admin", project_id, "project")
    for name, value in (changes.get("settings") or {}).items():
        if name in PROJECT_CHECKS and value:
            PROJECT_CHECKS[name](value)
    with transaction() as tx:
        name = changes.get("name")
        if name and one("SELECT 1 FROM project WHERE name = ? AND id <> ?", (name, project_id)):
            raise Conflict(f"There is a project {name!r} already: choose another name.")
        if changes:
            Project.update(**changes).where(Project.id == project_id).execute()
        tx.emit("project_changed", project_id, caller.actor, {"changed": sorted(changes)})
    return pick_project(caller, project_id)


# ── registration ──────────────────────────────────────────────────────────────────────────────

REGISTRATION_S = 3600


def registration_token(
    caller: Caller, project_id: str, hub_url: str, ttl_s=None, note=None
) -> dict:
    """Make a one-time token for a server of the project: {id, token, expires_at}.

    The hub's address is part of it, so that the agent needs nothing else.
    """
    require(caller, "server.token", project_id, "project")
    where = urlsafe_b64encode(hub_url.rstrip("/").encode()).decode().rstrip("=")
    token = f"orcreg_{where}.{secrets.token_urlsafe(32)}"
    with transaction() as tx:
        row = Registration.create(
            project_id=project_id,
            hash=digest(token),
            note=note,
            created_by=caller.actor,
            expires_at=clock.latest() + (ttl_s or REGISTRATION_S),
        )
        tx.emit(
            "registration_token_created", project_id, caller.actor, {"id": row.id, "note": note}
        )
    return {"id": row.id, "token": token, "expires_at": iso(row.expires_at)}


def install_commands(token: str, hub_url: str | None = None) -> dict[str, str]:
    """What to type on the new server, ready to copy; `script` does all of it in one."""
    script = {"script": f"curl -fsSL {hub_url}/install.sh | sh -s -- {token}"} if hub_url else {}
    return script | {
        "register": f"python agent.py --register {token} --name NAME --repo REPO=PATH",
        "run": "python agent.py",
    }


def redeem(token: str) -> dict:
    """Take a registration token for good, inside the caller's transaction; returns its row.

    Raises Unauthorised with one sentence that says what is wrong with it.
    """
    if not token.startswith("orcreg_") or "." not in token:
        raise Unauthorised(
            "This is not a registration token: it must begin with orcreg_. Make one in the "
            "dashboard or with `orchestratia server token`.",
            code="token_malformed",
        )
    row = one("SELECT * FROM registration WHERE hash = ?", (digest(token),))
    if not row:
        raise Unauthorised(
            "This registration token is unknown to this hub: make a new one.",
            code="token_unknown",
        )
    if row["used_at"]:
        raise Unauthorised(
            f"This registration token was already used at {iso(row['used_at'])}: it works once. "
            "Make a new one.",
            code="token_used",
        )
    if row["expires_at"] < clock.latest():
        raise Unauthorised(
            f"This registration token expired at {iso(row['expires_at'])}: make a new one.",
            code="token_expired",
        )
    Registration.update(used_at=time.time()).where(Registration.id == row["id"]).execute()
    return row


def new_server_key() -> str:
    return f"orc_{secrets.token_urlsafe(32)}"


def renewable(project_id: str, machine_id: str, name: str) -> Server | None:
    """The server a registration renews: project, non-empty machine id and name must all match."""
    if not machine_id:
        return None
    return Server.get_or_none(
        (Server.project_id == project_id)
        & (Server.machine_id == machine_id)
        & (Server.name == name)
        & ~Server.revoked
    )


# ── one door to a thing ───────────────────────────────────────────────────────────────────────

SHORTEST_PREFIX = 4
ALIVE = {
    "session": "state IN ('starting', 'active', 'disconnected', 'recovering')",
    "server": "revoked = 0",
}


def find(table: str, caller: Caller, ref: str, *, name: str | None = None) -> dict:
    """The row of `table` that `ref` means and `caller` may see.

    ref: an id (any case, with `#` or without dashes), a unique prefix of one, or, where `name` is
    the name column, a name. Raises NotFound, or Conflict `ambiguous` with the candidates.
    """
    wanted = _id_form(ref)
    looks = [("id = ?", (wanted,))]
    if name:  # where a name was used before, the one still living is meant
        looks += [(f"{name} = ? AND {ALIVE[table]}", (ref,)), (f"{name} = ?", (ref,))]
    if len(wanted) >= SHORTEST_PREFIX:
        looks.append(("id >= ? AND id < ?", (wanted, wanted + "g")))
    for where, values in looks:
        found = [
            row
            for row in rows(f"SELECT * FROM {table} WHERE {where} LIMIT 100", values)
            if can(caller, "read", row["project_id"])
        ]
        if found:
            break
    else:
        raise NotFound(f"There is no {table} {ref!r} that you can see.")
    if len(found) == 1:
        return found[0]
    raise Conflict(
        f"{ref!r} fits {len(found)} {table}s: say more of the id.",
        code="ambiguous",
        candidates=[{"id": r["id"], "name": _called(r)} for r in found[:20]],
    )


def _called(row: dict) -> str:
    return row.get("name") or row.get("title") or row.get("question") or row["subject"][:200]


def _id_form(ref: str) -> str:
    plain = ref.strip().removeprefix("#").lower()
    if len(plain) == 32 and "-" not in plain:
        return "-".join((plain[:8], plain[8:12], plain[12:16], plain[16:20], plain[20:]))
    return plain
