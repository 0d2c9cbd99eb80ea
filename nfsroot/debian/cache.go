package debian

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/google/renameio/v2"
)

// cache is the store of archive files: DIR/HOST/PATH as in the URL, beside it
// PATH.sha256 with the checksum taken when it was stored (sha256sum's format),
// and PATH.part with PATH.part.etag while it is being fetched. Files in a
// Debian pool and under by-hash never change under one name.
type cache struct {
	dir string
	log *slog.Logger

	mu       sync.Mutex
	locks    map[string]*keyLock  // guarded by mu
	verified map[string]time.Time // key to modification time when verified; guarded by mu
	expected map[string]string    // key to sha256 of the signed metadata; guarded by mu
	dropped  int                  // corrupt files dropped; guarded by mu
}

type keyLock struct {
	sync.Mutex
	users int // guarded by cache.mu
}

// byHashLife is how long an index that no build asked for stays. Indexes are
// superseded daily; packages stay.
const byHashLife = 30 * 24 * time.Hour

func openCache(dir string, log *slog.Logger) *cache {
	c := &cache{dir: dir, log: log, locks: map[string]*keyLock{}, verified: map[string]time.Time{}, expected: map[string]string{}}
	c.prune(time.Now())
	return c
}

// prune removes indexes that went unused for byHashLife.
func (c *cache) prune(now time.Time) {
	filepath.WalkDir(c.dir, func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.Contains(file, "/by-hash/") {
			return nil
		}
		if info, err := d.Info(); err == nil && now.Sub(info.ModTime()) > byHashLife {
			os.Remove(file)
		}
		return nil
	})
}

// cacheable reports whether a URL path's content can never change.
func cacheable(urlPath string) bool {
	if strings.Contains(urlPath, "/by-hash/SHA256/") {
		return len(path.Base(urlPath)) == 64
	}
	return strings.Contains(urlPath, "/pool/") &&
		(strings.HasSuffix(urlPath, ".deb") || strings.HasSuffix(urlPath, ".udeb"))
}

// cacheKey is the store's name for a URL, or an error for one that cannot be a
// file name. The path is already decoded.
func cacheKey(host, urlPath string) (string, error) {
	key := host + urlPath
	if !filepath.IsLocal(key) || path.Clean(key) != key || strings.ContainsRune(key, 0) {
		return "", fmt.Errorf("%q is no archive path", urlPath)
	}
	return key, nil
}

func (c *cache) file(key string) string { return filepath.Join(c.dir, filepath.FromSlash(key)) }

// lock keeps two fetches of one file apart.
func (c *cache) lock(key string) (unlock func()) {
	c.mu.Lock()
	l := c.locks[key]
	if l == nil {
		l = &keyLock{}
		c.locks[key] = l
	}
	l.users++
	c.mu.Unlock()
	l.Lock()
	return func() {
		l.Unlock()
		c.mu.Lock()
		defer c.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(c.locks, key)
		}
	}
}

// expect notes the checksum that the signed metadata gives for a file.
func (c *cache) expect(key, sum string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.expected[key] != sum {
		c.expected[key] = sum
		delete(c.verified, key)
	}
}

// want is the checksum that key must have, "" when nobody said.
func (c *cache) want(key string) string {
	if strings.Contains(key, "/by-hash/SHA256/") {
		return path.Base(key)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.expected[key]
}

// lookup returns the stored file if it is whole. A file that is not is dropped,
// so that it is fetched again. The caller holds the key's lock.
func (c *cache) lookup(key string) (file string, ok bool) {
	file = c.file(key)
	info, err := os.Stat(file)
	if err != nil {
		return "", false
	}
	c.mu.Lock()
	seen, done := c.verified[key]
	c.mu.Unlock()
	if done && seen.Equal(info.ModTime()) {
		return file, true
	}
	if err := c.verify(key, file); err != nil {
		c.log.Warn("a cached package is damaged and will be fetched again", "file", file, "err", err)
		c.drop(key)
		c.mu.Lock()
		c.dropped++
		c.mu.Unlock()
		return "", false
	}
	// The modification time doubles as the time of last use, for prune.
	now := time.Now().Truncate(time.Second)
	if os.Chtimes(file, now, now) == nil {
		c.mu.Lock()
		c.verified[key] = now
		c.mu.Unlock()
	}
	return file, true
}

func (c *cache) verify(key, file string) error {
	sidecar, err := os.ReadFile(file + ".sha256")
	if err != nil {
		return fmt.Errorf("no checksum beside it: %w", err)
	}
	stored, _, _ := strings.Cut(string(sidecar), " ")
	sum, err := sha256File(file)
	if err != nil {
		return err
	}
	if sum != stored {
		return fmt.Errorf("its sha256 is %s, stored was %q", sum, stored)
	}
	if want := c.want(key); want != "" && sum != want {
		return fmt.Errorf("its sha256 is %s, the archive says %s", sum, want)
	}
	return nil
}

// drop forgets a file and what is beside it.
func (c *cache) drop(key string) {
	file := c.file(key)
	for _, suffix := range []string{".sha256", "", ".part", ".part.etag"} {
		os.Remove(file + suffix)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.verified, key)
}

// part is a file that is being fetched.
type part struct {
	c    *cache
	key  string
	f    *os.File
	have int64  // bytes in it
	etag string // validator of the interrupted response
}

// openPart opens the file under way, with what an earlier fetch left of it. The
// caller holds the key's lock.
func (c *cache) openPart(key string) (*part, error) {
	name := c.file(key) + ".part"
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		f.Close()
		return nil, err
	}
	p := &part{c: c, key: key, f: f, have: size}
	if tag, err := os.ReadFile(name + ".etag"); err == nil {
		p.etag = string(tag)
	} else if err := p.restart(); err != nil {
		f.Close()
		return nil, err
	}
	return p, nil
}

// restart forgets what the part holds.
func (p *part) restart() error {
	p.have, p.etag = 0, ""
	os.Remove(p.f.Name() + ".etag")
	if err := p.f.Truncate(0); err != nil {
		return err
	}
	_, err := p.f.Seek(0, io.SeekStart)
	return err
}

// begin notes the validator of the response that now fills the part.
func (p *part) begin(etag string) error {
	if etag == "" {
		return nil
	}
	return os.WriteFile(p.f.Name()+".etag", []byte(etag), 0o644)
}

func (p *part) Write(b []byte) (int, error) {
	n, err := p.f.Write(b)
	p.have += int64(n)
	return n, err
}

// errChecksum is a download that is not what the signed metadata says.
var errChecksum = errors.New("wrong checksum")

// commit checks and stores the part under its name: data and checksum reach the
// disk before the name does.
func (p *part) commit() error {
	if err := p.f.Sync(); err != nil {
		return err
	}
	sum, err := sha256File(p.f.Name())
	if err != nil {
		return err
	}
	if want := p.c.want(p.key); want != "" && sum != want {
		p.restart()
		return fmt.Errorf("%w: %s came with sha256 %s, the archive's signed index says %s", errChecksum, p.key, sum, want)
	}
	file := p.c.file(p.key)
	line := sum + "  " + path.Base(p.key) + "\n"
	if err := renameio.WriteFile(file+".sha256", []byte(line), 0o644); err != nil {
		return err
	}
	if err := os.Rename(p.f.Name(), file); err != nil {
		return err
	}
	os.Remove(p.f.Name() + ".etag")
	if info, err := os.Stat(file); err == nil {
		p.c.mu.Lock()
		p.c.verified[p.key] = info.ModTime()
		p.c.mu.Unlock()
	}
	return syncDir(filepath.Dir(file))
}

func (p *part) close() error { return p.f.Close() }

func sha256File(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// syncDir makes a rename in dir last.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
