// Package debian fetches everything that an image takes from Debian: the
// packages of the shared root, the signed kernel with its modules, the boot
// loaders and firmware.
//
// Open starts a caching HTTP proxy on the loopback interface, and every byte
// comes through it: apt and mmdebstrap are pointed at it, and our own downloads
// share its store. So a package is fetched once, an interrupted download goes
// on where it stopped, and progress is known in bytes. What may be installed is
// decided by apt from the archive's signed metadata, with a configuration of
// its own that neither reads nor changes the host's; the checksums of that
// metadata decide whether a stored file is right.
//
// The steps, in the order a build takes them:
//
//	Preflight     is everything here that the build needs?
//	Open          proxy and private apt
//	Update        signed metadata
//	Check         do the configured packages exist?
//	Bootstrap     the Debian root as base.tar.zst
//	Kernel        vmlinuz and modules of the signed kernel
//	Download      single packages, to be opened with ExtractDeb
//
// The image pipeline calls it. It never writes outside its cache and work
// directories and the outputs named by the caller.
package debian

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"krgimage/images/progress"
)

// Options say which Debian, and where to keep things.
type Options struct {
	Suite      string   // "trixie"
	Mirror     string   // http or https URL
	Security   string   // mirror of SUITE-security; empty: no security updates
	Components []string // of the root; Download also sees non-free-firmware

	CacheDir string // packages, kept between builds
	WorkDir  string // apt's state, logs, temporary trees

	Keyring   string             // empty: the host's debian-archive-keyring
	Transport http.RoundTripper  // to the mirrors; nil: direct or by http_proxy of the environment
	Progress  *progress.Reporter // nil: none
	Log       *slog.Logger       // nil: none
}

// Repo is an open Debian archive. Its methods may be called from several
// goroutines, but apt runs one at a time.
type Repo struct {
	opt     Options
	keyring string
	mirrors []mirror
	cache   *cache
	proxy   *proxy
	log     *slog.Logger

	apt     sync.Mutex // held while apt runs
	updated bool       // guarded by apt
	index   *index     // guarded by apt; set by Update
}

// mirror is one configured archive.
type mirror struct {
	upstream *url.URL // as configured, without a trailing slash
	suites   []string
}

// aptURL is the mirror as apt must see it: a proxy can only look into http.
func (m mirror) aptURL() string {
	u := *m.upstream
	u.Scheme, u.User = "http", nil
	return u.String()
}

// Open makes the directories, and starts the proxy, which lives until Close or
// until ctx ends.
func Open(ctx context.Context, opt Options) (*Repo, error) {
	if opt.Suite == "" || opt.Mirror == "" || opt.CacheDir == "" || opt.WorkDir == "" {
		return nil, errors.New("debian: suite, mirror, cache and work directory are needed")
	}
	if !isPlain(opt.Suite) {
		return nil, fmt.Errorf("debian.suite: %q is no suite name", opt.Suite)
	}
	if len(opt.Components) == 0 {
		opt.Components = []string{"main"}
	}
	for _, c := range opt.Components {
		if !isPlain(c) {
			return nil, fmt.Errorf("debian.components: %q is no component name", c)
		}
	}
	opt.Log = cmp.Or(opt.Log, slog.New(slog.DiscardHandler))
	opt.Progress = cmp.Or(opt.Progress, progress.Discard())
	mirrors, err := mirrorsOf(opt)
	if err != nil {
		return nil, err
	}
	// apt and mmdebstrap are started with other working directories.
	for _, dir := range []*string{&opt.CacheDir, &opt.WorkDir} {
		abs, err := filepath.Abs(*dir)
		if err != nil {
			return nil, err
		}
		if err := os.MkdirAll(abs, 0o755); err != nil {
			return nil, err
		}
		*dir = abs
	}
	repo := &Repo{opt: opt, mirrors: mirrors, log: opt.Log.With("component", "debian")}
	repo.keyring, err = findKeyring(opt.Keyring)
	if err != nil {
		return nil, err
	}
	repo.cache = openCache(filepath.Join(opt.CacheDir, "archive"), repo.log)
	repo.proxy, err = startProxy(ctx, repo.cache, mirrors, opt.Transport, repo.log)
	if err != nil {
		return nil, err
	}
	return repo, nil
}

// Close stops the proxy; downloads under way end, and go on next time.
func (r *Repo) Close() error { return r.proxy.close() }

func mirrorsOf(opt Options) ([]mirror, error) {
	main, err := parseMirror("debian.mirror", opt.Mirror)
	if err != nil {
		return nil, err
	}
	rolling := slices.Contains([]string{"sid", "unstable", "testing", "experimental"}, opt.Suite)
	suites := []string{opt.Suite}
	if !rolling {
		suites = append(suites, opt.Suite+"-updates")
	}
	mirrors := []mirror{{main, suites}}
	if opt.Security != "" && !rolling {
		security, err := parseMirror("debian.security_mirror", opt.Security)
		if err != nil {
			return nil, err
		}
		mirrors = append(mirrors, mirror{security, []string{opt.Suite + "-security"}})
	}
	return mirrors, nil
}

func parseMirror(field, text string) (*url.URL, error) {
	u, err := url.Parse(strings.TrimRight(text, "/"))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	if (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("%s: %q is not an http or https address of a mirror, such as http://deb.debian.org/debian", field, text)
	}
	if strings.ContainsAny(u.Path, " \t\n\"';[]") {
		return nil, fmt.Errorf("%s: %q has characters that apt does not take in an address", field, text)
	}
	return u, nil
}

// isPlain holds for names that need no quoting anywhere: suites, components.
func isPlain(s string) bool {
	return s != "" && s[0] != '-' && s[0] != '.' && !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-._+/", r))
	})
}

// Package is one Debian package of an image, for its bill of materials.
type Package struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	Arch    string `json:"arch"`
	Source  string `json:"source,omitempty"` // source package, when its name differs
}

// File is a downloaded package file whose checksum agrees with the archive's
// signed metadata.
type File struct {
	Package
	Path   string // in the cache
	Size   int64  // bytes
	SHA256 string // hex
}
