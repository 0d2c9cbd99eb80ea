package debian

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// fakeMirror serves files below /debian and can be told to misbehave.
type fakeMirror struct {
	*httptest.Server
	mu       sync.Mutex
	files    map[string][]byte // path below the server; guarded by mu
	requests []string          // "GET /path range"; guarded by mu
	cutAfter int               // bytes after which a body is cut off once, 0: never; guarded by mu
	noRange  bool              // guarded by mu
}

func newMirror(t *testing.T) *fakeMirror {
	m := &fakeMirror{files: map[string][]byte{}}
	m.Server = httptest.NewServer(m)
	t.Cleanup(m.Close)
	return m
}

func (m *fakeMirror) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	body, ok := m.files[r.URL.Path]
	m.requests = append(m.requests, strings.TrimSpace(r.Method+" "+r.URL.Path+" "+r.Header.Get("Range")))
	cut, noRange := m.cutAfter, m.noRange
	m.mu.Unlock()
	if !ok {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Etag", `"`+strconv.Itoa(len(body))+`"`)
	if noRange {
		r.Header.Del("Range")
	}
	if cut > 0 && cut < len(body) && r.Header.Get("Range") == "" {
		m.mu.Lock()
		m.cutAfter = 0
		m.mu.Unlock()
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.Write(body[:cut])
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	http.ServeContent(w, r, "", time.Unix(1700000000, 0), bytes.NewReader(body))
}

func (m *fakeMirror) log() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]string(nil), m.requests...)
}

func (m *fakeMirror) mirror(t *testing.T) mirror {
	u, err := parseMirror("debian.mirror", m.URL+"/debian/")
	if err != nil {
		t.Fatal(err)
	}
	return mirror{upstream: u, suites: []string{"trixie"}}
}

// testProxy is a proxy before the mirror, and a client that uses it.
func testProxy(t *testing.T, dir string, m mirror) (*proxy, *http.Client) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	p, err := startProxy(t.Context(), openCache(dir, log), []mirror{m}, http.DefaultTransport, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.close() })
	via, err := url.Parse(p.url)
	if err != nil {
		t.Fatal(err)
	}
	return p, &http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(via), DisableKeepAlives: true}}
}

func fetch(t *testing.T, c *http.Client, address string) (int, string) {
	t.Helper()
	resp, err := c.Get(address)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s: %v", address, err)
	}
	return resp.StatusCode, string(body)
}

const debPath = "/debian/pool/main/x/x_1+2~3_all.deb"

func TestProxyKeepsPackagesAndPassesIndexes(t *testing.T) {
	m := newMirror(t)
	m.files[debPath] = []byte("package")
	m.files["/debian/dists/trixie/InRelease"] = []byte("release")
	dir := t.TempDir()
	_, client := testProxy(t, dir, m.mirror(t))
	for range 2 {
		if code, body := fetch(t, client, m.URL+debPath); code != 200 || body != "package" {
			t.Fatalf("%d %q", code, body)
		}
		if code, body := fetch(t, client, m.URL+"/debian/dists/trixie/InRelease"); code != 200 || body != "release" {
			t.Fatalf("%d %q", code, body)
		}
	}
	if code, _ := fetch(t, client, m.URL+"/debian/pool/none.deb"); code != 404 {
		t.Errorf("a missing package gives %d", code)
	}
	count := 0
	for _, r := range m.log() {
		if r == "GET "+debPath {
			count++
		}
	}
	if count != 1 {
		t.Errorf("the package was fetched %d times: %q", count, m.log())
	}
	stored := filepath.Join(dir, strings.TrimPrefix(m.URL, "http://"), debPath)
	if side, err := os.ReadFile(stored + ".sha256"); err != nil || !strings.HasSuffix(string(side), "  x_1+2~3_all.deb\n") {
		t.Errorf("sidecar %q %v", side, err)
	}
	// Another process finds it, with the mirror gone.
	m.Close()
	_, client = testProxy(t, dir, m.mirror(t))
	if code, body := fetch(t, client, m.URL+debPath); code != 200 || body != "package" {
		t.Errorf("from the cache: %d %q", code, body)
	}
}

func TestProxyDropsDamagedFile(t *testing.T) {
	m := newMirror(t)
	m.files[debPath] = []byte("package")
	dir := t.TempDir()
	_, client := testProxy(t, dir, m.mirror(t))
	fetch(t, client, m.URL+debPath)
	stored := filepath.Join(dir, strings.TrimPrefix(m.URL, "http://"), debPath)
	for name, damage := range map[string]func() error{
		"flipped bit":   func() error { return os.WriteFile(stored, []byte("pbckage"), 0o644) },
		"cut off":       func() error { return os.Truncate(stored, 3) },
		"no sidecar":    func() error { return os.Remove(stored + ".sha256") },
		"empty sidecar": func() error { return os.Truncate(stored+".sha256", 0) },
	} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		before := len(m.log())
		p, client := testProxy(t, dir, m.mirror(t))
		if code, body := fetch(t, client, m.URL+debPath); code != 200 || body != "package" {
			t.Errorf("%s: %d %q", name, code, body)
		}
		if len(m.log()) != before+1 || p.cache.dropped != 1 {
			t.Errorf("%s: fetched %d times again, %d dropped", name, len(m.log())-before, p.cache.dropped)
		}
	}
}

func TestProxyResumesBrokenTransfer(t *testing.T) {
	for _, noRange := range []bool{false, true} {
		m := newMirror(t)
		body := bytes.Repeat([]byte("0123456789abcdef"), 64<<10)
		m.files[debPath] = body
		m.cutAfter, m.noRange = 700_001, noRange
		_, client := testProxy(t, t.TempDir(), m.mirror(t))
		code, got := fetch(t, client, m.URL+debPath)
		if code != 200 || got != string(body) {
			t.Errorf("no range %v: %d, %d bytes", noRange, code, len(got))
		}
		log := m.log()
		if len(log) != 2 || !strings.Contains(log[1], "bytes=") {
			t.Errorf("requests: %q", log)
		}
	}
}

// TestProxyResumesOtherSession continues what a killed process left.
func TestProxyResumesOtherSession(t *testing.T) {
	body := bytes.Repeat([]byte("0123456789abcdef"), 4<<10)
	for _, test := range []struct {
		name, etag string
		part       []byte
		wantRange  bool
	}{
		{"continued", fmt.Sprintf("%q", strconv.Itoa(len(body))), body[:1000], true},
		{"another version", `"other"`, []byte("different bytes"), true},
		{"validator unknown", "", body[:1000], false},
		{"longer than the file", fmt.Sprintf("%q", strconv.Itoa(len(body))), append(bytes.Clone(body), "more"...), true},
		{"damaged", fmt.Sprintf("%q", strconv.Itoa(len(body))), bytes.Repeat([]byte("x"), 1000), true},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := newMirror(t)
			m.files[debPath] = body
			dir := t.TempDir()
			p, client := testProxy(t, dir, m.mirror(t))
			host := strings.TrimPrefix(m.URL, "http://")
			stored := filepath.Join(dir, host, debPath)
			if err := os.MkdirAll(filepath.Dir(stored), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(stored+".part", test.part, 0o644); err != nil {
				t.Fatal(err)
			}
			if test.etag != "" {
				if err := os.WriteFile(stored+".part.etag", []byte(test.etag), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			sum := sha256Of(body)
			p.cache.expect(host+debPath, sum)
			if test.name == "damaged" {
				// The first client is cut off or gets rubbish that its own
				// checksum refuses; the next one gets the right file.
				up, _ := url.Parse(m.URL + debPath)
				if _, err := p.fetch(t.Context(), host+debPath, up, nil); !errors.Is(err, errChecksum) {
					t.Fatalf("%v", err)
				}
			}
			if code, got := fetch(t, client, m.URL+debPath); code != 200 || got != string(body) {
				t.Errorf("%d, %d bytes", code, len(got))
			}
			if got := strings.Contains(m.log()[0], "bytes="); got != test.wantRange {
				t.Errorf("requests: %q", m.log())
			}
			// The client has the last byte before the file has its name.
			p.cache.lock(host + debPath)()
			if _, err := os.Stat(stored + ".part"); err == nil {
				t.Error("the part is left over")
			}
		})
	}
}

func TestProxyIsNotOpen(t *testing.T) {
	m := newMirror(t)
	m.files["/secret"] = []byte("secret")
	m.files["/debian/ok"] = []byte("ok")
	p, client := testProxy(t, t.TempDir(), m.mirror(t))
	for _, address := range []string{m.URL + "/secret", m.URL + "/debian/../secret", m.URL + "/debian/%2e%2e/secret", m.URL + "/debianx/y", "http://example.invalid/debian/ok", p.url + "/debian/ok"} {
		if code, body := fetch(t, client, address); code == 200 || strings.Contains(body, "secret") {
			t.Errorf("%s: %d %q", address, code, body)
		}
	}
	for _, method := range []string{"POST", "PUT", "CONNECT"} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		target := m.URL + "/debian/ok"
		if method == "CONNECT" {
			target = strings.TrimPrefix(m.URL, "http://")
		}
		fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", method, target)
		answer := make([]byte, 12)
		if _, err := io.ReadFull(conn, answer); err != nil || string(answer) != "HTTP/1.1 405" {
			t.Errorf("%s: %q %v", method, answer, err)
		}
		conn.Close()
	}
}

func TestProxyByHash(t *testing.T) {
	m := newMirror(t)
	sum := sha256Of([]byte("index"))
	good, bad := "/debian/dists/t/main/by-hash/SHA256/"+sum, "/debian/dists/t/main/by-hash/SHA256/"+strings.Repeat("0", 64)
	m.files[good], m.files[bad] = []byte("index"), []byte("index")
	p, client := testProxy(t, t.TempDir(), m.mirror(t))
	for range 2 {
		if code, body := fetch(t, client, m.URL+good); code != 200 || body != "index" {
			t.Errorf("%d %q", code, body)
		}
	}
	up, _ := url.Parse(m.URL + bad)
	if _, err := p.fetch(t.Context(), up.Host+bad, up, nil); !errors.Is(err, errChecksum) {
		t.Errorf("%v", err)
	}
	if len(m.log()) != 2 {
		t.Errorf("%q", m.log())
	}
	p.cache.prune(time.Now().Add(byHashLife + time.Hour))
	if _, ok := p.cache.lookup(up.Host + good); ok {
		t.Error("an index that nobody uses stays for ever")
	}
}

func TestProxyHTTPSMirror(t *testing.T) {
	m := &fakeMirror{files: map[string][]byte{debPath: []byte("package")}}
	m.Server = httptest.NewTLSServer(m)
	defer m.Close()
	conf := m.mirror(t)
	log := slog.New(slog.DiscardHandler)
	p, err := startProxy(t.Context(), openCache(t.TempDir(), log), []mirror{conf}, m.Client().Transport, log)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	via, _ := url.Parse(p.url)
	client := &http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(via)}}
	if !strings.HasPrefix(conf.aptURL(), "http://") {
		t.Fatal(conf.aptURL())
	}
	if code, body := fetch(t, client, strings.TrimSuffix(conf.aptURL(), "/debian")+debPath); code != 200 || body != "package" {
		t.Errorf("%d %q", code, body)
	}
}

func TestUnreachableMirrorIsNamed(t *testing.T) {
	m := newMirror(t)
	gone := m.URL
	m.Close()
	keyring := filepath.Join(t.TempDir(), "keys.gpg")
	if err := os.WriteFile(keyring, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	repo, err := Open(t.Context(), Options{Suite: "trixie", Mirror: gone + "/debian", CacheDir: t.TempDir(), WorkDir: t.TempDir(), Keyring: keyring, Transport: http.DefaultTransport})
	if err != nil {
		t.Fatal(err)
	}
	defer repo.Close()
	err = repo.Update(t.Context())
	var mirrorErr *MirrorError
	if !errors.As(err, &mirrorErr) || !strings.Contains(err.Error(), strings.TrimPrefix(gone, "http://")) || !strings.Contains(err.Error(), "fix:") || strings.Count(err.Error(), "\n") > 2 {
		t.Errorf("%v", err)
	}
}

func TestNoSuchSuiteIsNamed(t *testing.T) {
	m := newMirror(t)
	keyring := filepath.Join(t.TempDir(), "keys.gpg")
	if err := os.WriteFile(keyring, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	repo, err := Open(t.Context(), Options{Suite: "trixy", Mirror: m.URL + "/debian", CacheDir: t.TempDir(), WorkDir: t.TempDir(), Keyring: keyring, Transport: http.DefaultTransport})
	if err != nil {
		t.Fatal(err)
	}
	defer repo.Close()
	if err := repo.Update(t.Context()); err == nil || !strings.Contains(err.Error(), "404") || !strings.Contains(err.Error(), "dists/trixy/InRelease") || !strings.Contains(err.Error(), "debian.suite") {
		t.Errorf("%v", err)
	}
}

func TestFetchStopsWithContext(t *testing.T) {
	release := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "100")
		w.Write([]byte("some"))
		w.(http.Flusher).Flush()
		<-release
	}))
	defer server.Close()
	defer close(release)
	u, _ := url.Parse(server.URL + "/debian")
	p, _ := testProxy(t, t.TempDir(), mirror{upstream: u})
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("stopped by hand")
	up, _ := url.Parse(server.URL + debPath)
	defer p.watch(func(int64) { cancel(stop) })()
	if _, err := p.fetch(ctx, up.Host+debPath, up, nil); err == nil {
		t.Error("no error")
	}
	// What came is there for the next time.
	if info, err := os.Stat(p.cache.file(up.Host+debPath) + ".part"); err != nil || info.Size() != 4 {
		t.Errorf("%v %v", info, err)
	}
}

func TestMirrorFields(t *testing.T) {
	for _, bad := range []string{"", "ftp://x/debian", "deb.debian.org/debian", "http://", "http://x/a b", "http://x/a\"b", "http://x/?q", "file:///srv"} {
		if _, err := parseMirror("debian.mirror", bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
	for _, bad := range []Options{{Suite: "tri xie"}, {Suite: "-trixie"}, {Suite: "trixie", Components: []string{"main\ndeb"}}} {
		bad.Mirror, bad.CacheDir, bad.WorkDir = "http://x/debian", t.TempDir(), t.TempDir()
		if _, err := Open(t.Context(), bad); err == nil {
			t.Errorf("%+v is taken", bad)
		}
	}
}
