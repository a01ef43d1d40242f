"""A small Hugging Face Hub on loopback: as much of its protocol as publishing and loading a model takes.

Repositories, branches, tags, pull requests, the upload of large files and their download from another origin, over real
HTTP, with faults on demand. It keeps all in memory and listens on 127.0.0.1 only.
"""
import base64
import hashlib
import itertools
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = dict(hf_testwriter='me', hf_testreader='guest')
WRITER, READER = TOKENS
LARGE = ('.safetensors', '.png', '.bin')


@dataclass
class Commit:
    oid: str
    message: str
    parent: str
    files: dict  # path: (content, is large)


@dataclass
class Repo:
    private: bool
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)
    objects: dict = field(default_factory=dict)  # large files by sha256

    def add(self, branch, message, files):
        parent = self.branches.get(branch, '')
        oid = hashlib.sha1(f'{len(self.commits)} {branch} {message}'.encode()).hexdigest()
        self.commits[oid] = Commit(oid, message, parent, files)
        self.branches[branch] = oid
        return oid

    def commit(self, revision):
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(oid)


@dataclass
class Fault:
    method: str
    path: str  # regular expression
    times: int
    status: int = 0
    cut_after: int = -1  # bytes of the body, after which the connection is closed
    message: str = ''


class Failure(Exception):
    def __init__(self, status, message, code='', **content):
        super().__init__(message)
        self.status, self.code, self.content = status, code, content


class HubServer:
    """``with HubServer() as server``: ``server.url`` is the endpoint, ``server.repos`` what is on it."""

    def __init__(self):
        self.repos = {}
        self.faults = []
        self.requests = []  # (method, path, status) in the order of the answers
        self.lock = threading.RLock()
        self.numbers = itertools.count(1)
        handler = type('Handler', (Handler,), dict(hub=self))
        # Large files come from another origin, as they do on the real Hub.
        self.servers = [ThreadingHTTPServer(('127.0.0.1', 0), handler) for _ in range(2)]
        self.url, self.files_url = (f'http://127.0.0.1:{server.server_address[1]}' for server in self.servers)

    def __enter__(self):
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
        return self

    def __exit__(self, *exc):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def fail(self, method, path, times=1, **what):
        self.faults.append(Fault(method, path, times, **what))

    def fault(self, method, path):
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def count(self, method, path):
        return Counter(status for m, p, status in self.requests if m == method and re.search(path, p))

    def files(self, repo, revision='main'):
        return {path: content for path, (content, _) in self.repos[repo].commit(revision).files.items()}

    def messages(self, repo, revision='main'):
        commit, found = self.repos[repo].commit(revision), []
        while commit is not None:
            found.append(commit.message)
            commit = self.repos[repo].commits.get(commit.parent)
        return found


def _file_info(path, content, large):
    info = dict(type='file', path=path, size=len(content), oid=_git_oid(content))
    if large:
        info['lfs'] = dict(oid=hashlib.sha256(content).hexdigest(), size=len(content), pointerSize=130)
    return info


def _git_oid(content):
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self):
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if self.headers.get('Transfer-Encoding') == 'chunked':
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        parts = urlsplit(self.path)
        self.query, path = parse_qs(parts.query), unquote(parts.path)
        self.fault = self.hub.fault(self.command, path)
        try:
            if self.fault and self.fault.status:
                raise Failure(self.fault.status, self.fault.message or f'injected {self.fault.status}')
            with self.hub.lock:
                status, content, headers = self._answer(path, body)
        except Failure as e:
            status, content = e.status, json.dumps(dict(e.content, error=str(e))).encode()
            headers = {'X-Error-Message': str(e), **({'X-Error-Code': e.code} if e.code else {})}
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {'Content-Type': 'application/json', **headers}
        self.hub.requests.append((self.command, path, status))
        self.send_response(status)
        for name, value in {'Content-Length': str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == 'HEAD':
            return
        if self.fault and self.fault.cut_after >= 0:
            self.wfile.write(content[:self.fault.cut_after])
            self.close_connection = True
        else:
            self.wfile.write(content)

    def _user(self):
        token = (self.headers.get('Authorization') or '').removeprefix('Bearer ')
        if token and token not in TOKENS:
            raise Failure(401, 'Invalid credentials in Authorization header')
        return TOKENS.get(token)

    def _writer(self):
        user = self._user()
        if user is None:
            raise Failure(401, 'Invalid username or password.')
        if user != 'me':
            raise Failure(403, f'{user} may not write here')

    def _repo(self, name):
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self._user() != 'me'):
            raise Failure(404 if self._user() else 401, 'Repository not found', 'RepoNotFound')
        return repo

    def _commit(self, repo, revision):
        commit = repo.commit(revision)
        if commit is None:
            raise Failure(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return commit

    def _answer(self, path, body):
        routes = (
            ('GET', r'/api/whoami-v2', self._whoami),
            ('POST', r'/api/validate-yaml', self._validate),
            ('POST', r'/api/repos/create', self._create),
            ('GET', r'/api/models/(\w+/[\w.-]+)(?:/revision/(.+))?', self._info),
            ('GET', r'/api/models/(\w+/[\w.-]+)/refs', self._refs),
            ('GET', r'/api/models/(\w+/[\w.-]+)/tree/([^/]+)', self._tree),
            ('POST', r'/api/models/(\w+/[\w.-]+)/paths-info/(.+)', self._paths_info),
            ('POST', r'/api/models/(\w+/[\w.-]+)/branch/(.+)', self._branch),
            ('POST', r'/api/models/(\w+/[\w.-]+)/tag/(.+)', self._tag),
            ('POST', r'/api/models/(\w+/[\w.-]+)/preupload/(.+)', self._preupload),
            ('POST', r'/api/models/(\w+/[\w.-]+)/commit/(.+)', self._send_commit),
            ('POST', r'/(\w+/[\w.-]+)\.git/info/lfs/objects/batch', self._lfs_batch),
            ('PUT', r'/upload/(\w+/[\w.-]+)/(\w{64})', self._lfs_put),
            ('POST', r'/verify/(\w+/[\w.-]+)', self._lfs_verify),
            ('(?:GET|HEAD)', r'/(\w+/[\w.-]+)/resolve/([^/]+(?:/pr/\d+)?)/(.+)', self._resolve),
            ('(?:GET|HEAD)', r'/files/(\w+/[\w.-]+)/(\w{64})', self._file),
        )
        for method, pattern, answer in routes:
            match = re.fullmatch(pattern, path)
            if match and re.fullmatch(method, self.command):
                return answer(*match.groups(), body)
        raise Failure(404, f'no such endpoint: {self.command} {path}')

    def _whoami(self, body):
        user = self._user()
        if user is None:
            raise Failure(401, 'Invalid username or password.')
        return 200, dict(type='user', name=user, orgs=[], auth=dict(accessToken=dict(role='write'))), {}

    def _validate(self, body):
        return 200, dict(errors=[], warnings=[]), {}

    def _create(self, body):
        self._writer()
        wanted = json.loads(body)
        name = f'{wanted["organization"]}/{wanted["name"]}'
        if name in self.hub.repos:
            raise Failure(409, 'You already created this model repo', url=f'{self.hub.url}/{name}')
        private = bool(wanted.get('private')) or wanted.get('visibility') == 'private'
        repo = self.hub.repos[name] = Repo(private)
        repo.add('main', 'initial commit', {'.gitattributes': (b'*.safetensors filter=lfs\n', False)})
        return 200, dict(url=f'{self.hub.url}/{name}', name=name, id=name), {}

    def _info(self, name, revision, body):
        repo = self._repo(name)
        commit = self._commit(repo, revision or 'main')
        siblings = [dict(rfilename=path) for path in commit.files]
        if 'blobs' in self.query:
            siblings = [
                dict({key: value for key, value in _file_info(path, *file).items() if key in ('size', 'lfs')},
                     rfilename=path) for path, file in commit.files.items()]
            for file in siblings:
                if 'lfs' in file:
                    file['lfs']['sha256'] = file['lfs'].pop('oid')
        return 200, dict(
            _id='1', id=name, modelId=name, sha=commit.oid, private=repo.private, gated=False, disabled=False, tags=[],
            downloads=0, likes=0, siblings=siblings), {}

    def _refs(self, name, body):
        repo = self._repo(name)

        def refs(kind, found):
            return [dict(name=n, ref=f'refs/{kind}/{n}', targetCommit=oid) for n, oid in found.items()]

        return 200, dict(branches=refs('heads', repo.branches), tags=refs('tags', repo.tags), converts=[]), {}

    def _tree(self, name, revision, body):
        files = self._commit(self._repo(name), revision).files
        return 200, [_file_info(path, *file) for path, file in files.items()], {}

    def _paths_info(self, name, revision, body):
        files = self._commit(self._repo(name), revision).files
        asked = parse_qs(body.decode()).get('paths', []) if b'=' in body else json.loads(body)['paths']
        return 200, [_file_info(path, *files[path]) for path in asked if path in files], {}

    def _branch(self, name, branch, body):
        self._writer()
        repo = self._repo(name)
        if branch in repo.branches:
            raise Failure(409, f'Branch {branch} already exists')
        repo.branches[branch] = repo.branches['main']
        return 200, {}, {}

    def _tag(self, name, revision, body):
        self._writer()
        repo = self._repo(name)
        tag = json.loads(body)['tag']
        if tag in repo.tags:
            raise Failure(409, f'Tag {tag} already exists')
        repo.tags[tag] = self._commit(repo, revision).oid
        return 200, {}, {}

    def _preupload(self, name, revision, body):
        self._writer()
        there = self._commit(self._repo(name), revision).files
        files = []
        for file in json.loads(body)['files']:
            path = file['path']
            info = dict(path=path, uploadMode='lfs' if path.endswith(LARGE) else 'regular', shouldIgnore=False)
            if path in there:
                content, large = there[path]
                info['oid'] = hashlib.sha256(content).hexdigest() if large else _git_oid(content)
            files.append(info)
        return 200, dict(files=files), {}

    def _lfs_batch(self, name, body):
        self._writer()
        repo = self._repo(name)
        objects = []
        for wanted in json.loads(body)['objects']:
            if wanted['oid'] not in repo.objects:
                wanted['actions'] = dict(
                    upload=dict(href=f'{self.hub.files_url}/upload/{name}/{wanted["oid"]}', header={}),
                    verify=dict(href=f'{self.hub.url}/verify/{name}', header={}),
                )
            objects.append(wanted)
        return 200, dict(transfer='basic', objects=objects), {}

    def _lfs_put(self, name, oid, body):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Failure(400, 'not what was announced')
        self.hub.repos[name].objects[oid] = body
        return 200, b'', {}

    def _lfs_verify(self, name, body):
        self._writer()
        sent = json.loads(body)
        content = self._repo(name).objects.get(sent['oid'])
        if content is None or len(content) != sent['size']:
            raise Failure(422, 'not uploaded')
        return 200, {}, {}

    def _send_commit(self, name, revision, body):
        self._writer()
        repo = self._repo(name)
        head = self._commit(repo, revision)
        lines = [json.loads(line) for line in body.splitlines() if line]
        header = next(line['value'] for line in lines if line['key'] == 'header')
        if header.get('parentCommit') not in (None, head.oid):
            raise Failure(412, 'A commit has happened since. Please refresh and try again.')
        files = dict(head.files)
        for line in lines:
            value = line['value']
            if line['key'] == 'file':
                files[value['path']] = (base64.b64decode(value['content']), False)
            elif line['key'] == 'lfsFile':
                if value['oid'] not in repo.objects:
                    raise Failure(400, f'{value["path"]} was not uploaded')
                files[value['path']] = (repo.objects[value['oid']], True)
            elif line['key'] == 'deletedFile':
                del files[value['path']]
        answer = dict(success=True)
        if 'create_pr' in self.query:
            number = next(self.hub.numbers)
            revision = f'refs/pr/{number}'
            repo.branches[revision] = head.oid
            answer['pullRequestUrl'] = f'{self.hub.url}/{name}/discussions/{number}'
        oid = repo.add(revision, header['summary'], files)
        return 200, dict(answer, commitOid=oid, commitUrl=f'{self.hub.url}/{name}/commit/{oid}'), {}

    def _resolve(self, name, revision, path, body):
        commit = self._commit(self._repo(name), revision)
        headers = {'X-Repo-Commit': commit.oid}
        if path not in commit.files:
            raise Failure(404, f'no {path}', 'EntryNotFound')
        content, large = commit.files[path]
        if not large:
            return 200, content, {**headers, 'ETag': f'"{_git_oid(content)}"'}
        oid = hashlib.sha256(content).hexdigest()
        headers.update({
            'X-Linked-Etag': f'"{oid}"', 'X-Linked-Size': str(len(content)),
            'Location': f'{self.hub.files_url}/files/{name}/{oid}',
        })
        return 302, b'', headers

    def _file(self, name, oid, body):
        if self.headers.get('Authorization'):
            raise Failure(400, 'a token came where none belongs')
        return 200, self.hub.repos[name].objects[oid], dict(ETag=f'"{oid}"')
