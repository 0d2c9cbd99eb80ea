package debian

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/renameio/v2"

	"krgimage/images/progress"
	"krgimage/nfsroot/debian/space"
)

// aptConf is apt.conf(5) for a private apt: its own sources, lists and cache,
// an empty list of installed packages, nothing read from /etc/apt, and no
// change of user (the _apt user could not reach a private directory).
const aptConf = `Dir::Etc "%[1]s/etc";
Dir::Etc::main "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::sourcelist "%[1]s/etc/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::Etc::trusted "%[1]s/etc/keyring.gpg";
Dir::Etc::trustedparts "/dev/null";
Dir::State "%[1]s/state";
Dir::State::status "%[1]s/state/status";
Dir::Cache "%[1]s/cache";
Dir::Log "%[1]s/log";
APT::Sandbox::User "root";
APT::Architecture "amd64";
APT::Architectures { "amd64"; };
APT::Get::List-Cleanup "true";
Acquire::http::Proxy "%[2]s";
Acquire::https::Proxy "DIRECT";
Acquire::Retries "3";
Acquire::Languages "none";
Acquire::GzipIndexes "false";
Acquire::PDiffs "false";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
%[3]s`

// archiveSettings are apt options that the archive itself needs, in the private
// apt as in mmdebstrap's.
func (r *Repo) archiveSettings() []string {
	for _, m := range r.mirrors {
		// A snapshot of the past has an expired Release file by nature.
		if strings.HasPrefix(m.upstream.Host, "snapshot.") {
			return []string{`Acquire::Check-Valid-Until "false";`}
		}
	}
	return nil
}

// sources is the sources.list that apt gets while building: every mirror over
// http, through the proxy.
func (r *Repo) sources(components []string) string {
	var b strings.Builder
	for _, m := range r.mirrors {
		for _, suite := range m.suites {
			fmt.Fprintf(&b, "deb [signed-by=%s arch=amd64] %s %s %s\n", r.keyring, m.aptURL(), suite, strings.Join(components, " "))
		}
	}
	return b.String()
}

// finalSources is the debian.sources (deb822, sources.list(5)) of the finished
// root: the real mirrors.
func (r *Repo) finalSources() string {
	var b strings.Builder
	b.WriteString("# Written by krgimage; see debian: in cluster.yaml.\n")
	for i, m := range r.mirrors {
		if i > 0 {
			b.WriteByte('\n')
		}
		u := *m.upstream
		u.User = nil
		fmt.Fprintf(&b, "Types: deb\nURIs: %s\nSuites: %s\nComponents: %s\nSigned-By: %s\n",
			&u, strings.Join(m.suites, " "), strings.Join(r.opt.Components, " "), rootKeyring)
	}
	return b.String()
}

// rootKeyring is where debian-archive-keyring has its keys inside the root.
const rootKeyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// Update fetches the signed metadata. The other methods do it by themselves
// when nobody did.
func (r *Repo) Update(ctx context.Context) error {
	r.apt.Lock()
	defer r.apt.Unlock()
	r.updated = false
	return r.update(ctx)
}

// update brings apt's lists and the index up to date, once. The caller holds
// r.apt.
func (r *Repo) update(ctx context.Context) error {
	if r.updated {
		return nil
	}
	step := r.opt.Progress.Step("Debian package lists")
	if err := r.probe(ctx); err != nil {
		return step.Fail(err)
	}
	dir := filepath.Join(r.opt.WorkDir, "apt")
	for _, sub := range []string{"etc", "state/lists/partial", "cache/archives/partial", "log"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return step.Fail(space.Explain(err, "package lists are fetched", dir, 0))
		}
	}
	components := slices.Clone(r.opt.Components)
	if !slices.Contains(components, "non-free-firmware") {
		components = append(components, "non-free-firmware")
	}
	conf := fmt.Sprintf(aptConf, dir, r.proxy.url, strings.Join(r.archiveSettings(), "\n"))
	for name, text := range map[string]string{"etc/sources.list": r.sources(components), "state/status": "", "apt.conf": conf} {
		if err := renameio.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return step.Fail(space.Explain(err, "package lists are fetched", dir, 0))
		}
	}
	end := r.proxy.watch(func(n int64) { step.Bytes(n, 0) })
	_, err := r.run(ctx, "package lists", "apt-update.log", nil, "apt-get", "update", "--error-on=any")
	end()
	if err != nil {
		return step.Fail(err)
	}
	if r.index, err = r.loadIndex(ctx); err != nil {
		return step.Fail(err)
	}
	r.updated = true
	step.Done("%d packages in %s", len(r.index.byName), r.opt.Suite)
	return nil
}

// probe asks every mirror for its suites' Release files, so that a mirror that
// is away or has no such suite is named as such before apt starts.
func (r *Repo) probe(ctx context.Context) error {
	for _, m := range r.mirrors {
		for _, suite := range m.suites {
			up := m.upstream.JoinPath("dists", suite, "InRelease")
			resp, err := r.proxy.get(ctx, http.MethodHead, up, nil)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err != nil {
				return err
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				return &MirrorError{Mirror: up.Host, URL: up.Redacted(), Err: &statusError{resp.StatusCode, resp.Status}}
			}
		}
	}
	return nil
}

// run starts a program with the private apt configuration and its output in a
// log file of the work directory. When it fails, the error is what the proxy
// saw, or a full disk, or the end of the log.
func (r *Repo) run(ctx context.Context, what, logName string, prepare func(*exec.Cmd), name string, args ...string) (out []byte, err error) {
	program, err := findTool(name)
	if err != nil {
		return nil, err
	}
	logPath := filepath.Join(r.opt.WorkDir, logName)
	logFile, err := os.Create(logPath)
	if err != nil {
		return nil, space.Explain(err, what+" are fetched", r.opt.WorkDir, 0)
	}
	defer logFile.Close()
	var stdout bytes.Buffer
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = cleanEnv("APT_CONFIG=" + filepath.Join(r.opt.WorkDir, "apt", "apt.conf"))
	cmd.Stdout, cmd.Stderr = &stdout, logFile
	if prepare != nil {
		prepare(cmd)
	}
	stopGently(cmd)
	r.proxy.takeErr()
	runErr := cmd.Run()
	if runErr == nil {
		return stdout.Bytes(), nil
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	// Programs put their errors on either stream.
	logFile.Write(stdout.Bytes())
	return nil, r.explainIn(what, logPath, r.opt.WorkDir, runErr)
}

// explainIn makes one message of a failed apt or mmdebstrap that wrote to dir.
func (r *Repo) explainIn(what, logPath, dir string, runErr error) error {
	log, _ := os.ReadFile(logPath)
	upstream := r.proxy.takeErr()
	var full *space.Error
	switch {
	case errors.As(upstream, &full):
		return full
	case space.InLog(log):
		return space.Full(what+" are fetched", dir, 0)
	case upstream != nil:
		return fmt.Errorf("%s: %w\n  the log is %s", what, upstream, logPath)
	case bytes.Contains(log, []byte("NO_PUBKEY")) || bytes.Contains(log, []byte("is not signed")) || bytes.Contains(log, []byte("EXPKEYSIG")) || bytes.Contains(log, []byte("Missing key")):
		return fmt.Errorf("%s: the signature of %s cannot be checked with the keys in %s\n  fix: apt-get install debian-archive-keyring (a newer one), or check debian.mirror and debian.suite in cluster.yaml\n  the log is %s",
			what, r.opt.Suite, r.keyring, logPath)
	case bytes.Contains(log, []byte("unable to pick chroot mode")):
		return fmt.Errorf("%s: this user may not make user namespaces with subordinate ids, which mmdebstrap needs without root\n  fix: run it with sudo, or: apt-get install uidmap, and give the user a line in /etc/subuid and /etc/subgid\n  the log is %s", what, logPath)
	}
	return fmt.Errorf("%s: %w; the log is %s and ends:\n%s", what, runErr, logPath, lastLines(log, 6))
}

// lastLines are the last n lines that are not empty, errors before all else.
func lastLines(log []byte, n int) string {
	var all, errs []string
	for line := range strings.Lines(string(log)) {
		line = strings.TrimRight(line, "\r\n")
		if strings.TrimSpace(line) == "" {
			continue
		}
		all = append(all, line)
		if strings.HasPrefix(line, "E: ") || strings.HasPrefix(line, "dpkg: error") {
			errs = append(errs, line)
		}
	}
	if len(errs) > 0 {
		all = errs
	}
	if len(all) > n {
		all = all[len(all)-n:]
	}
	return "    " + strings.Join(all, "\n    ")
}

// cleanEnv is a build's environment: nothing of the caller's may change what is
// built, and programs must reach the mirrors through our proxy alone.
func cleanEnv(add ...string) []string {
	env := []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive", "TZ=UTC",
		"HOME=" + os.Getenv("HOME"), "USER=" + os.Getenv("USER"), "LOGNAME=" + os.Getenv("LOGNAME"),
	}
	return append(env, add...)
}

// Check finds names that no package of the suite has or provides, before a long
// build starts.
func (r *Repo) Check(ctx context.Context, names []string) error {
	r.apt.Lock()
	defer r.apt.Unlock()
	if err := r.update(ctx); err != nil {
		return err
	}
	var bad []error
	for _, name := range names {
		if err := r.index.check(name, r.opt.Components); err != nil {
			bad = append(bad, err)
		}
	}
	return errors.Join(bad...)
}

// Download fetches packages by name, the newest version that the suite and its
// updates have, and returns them in the order asked.
func (r *Repo) Download(ctx context.Context, names []string) ([]File, error) {
	r.apt.Lock()
	defer r.apt.Unlock()
	if err := r.update(ctx); err != nil {
		return nil, err
	}
	var entries []*entry
	var total int64
	for _, name := range names {
		e, err := r.index.newest(name)
		if err != nil {
			return nil, err
		}
		entries = append(entries, e)
		total += e.size
	}
	step := r.opt.Progress.Step("Debian packages")
	var done int64
	var files []File
	for _, e := range entries {
		step.Note("%s %s", e.Name, e.Version)
		end := r.proxy.watch(func(n int64) { step.Bytes(done+n, total) })
		file, err := r.fetch(ctx, e)
		end()
		if err != nil {
			return nil, step.Fail(fmt.Errorf("package %s: %w", e.Name, err))
		}
		done += e.size
		step.Bytes(done, total)
		files = append(files, file)
	}
	step.Done("%d, %s", len(files), progress.Size(total))
	return files, nil
}

// fetch brings one package into the cache. A mirror that sends the wrong bytes
// is asked once more.
func (r *Repo) fetch(ctx context.Context, e *entry) (File, error) {
	up, key, err := e.location()
	if err != nil {
		return File{}, err
	}
	if free, err := space.Free(r.opt.CacheDir); err == nil && free < e.size {
		if _, err := os.Stat(r.cache.file(key)); err != nil {
			return File{}, space.Full("packages are fetched", r.opt.CacheDir, e.size)
		}
	}
	r.cache.expect(key, e.sha256)
	path, err := r.proxy.fetch(ctx, key, up, nil)
	if errors.Is(err, errChecksum) {
		r.log.Warn("a package came damaged and is fetched once more", "package", e.Name, "err", err)
		path, err = r.proxy.fetch(ctx, key, up, nil)
	}
	if err != nil {
		return File{}, err
	}
	return File{Package: e.Package, Path: path, Size: e.size, SHA256: e.sha256}, nil
}

// location is where an index entry's file is on its mirror and in the cache.
func (e *entry) location() (*url.URL, string, error) {
	up := e.mirror.upstream.JoinPath(e.filename)
	key, err := cacheKey(up.Host, up.Path)
	return up, key, err
}
