package etcd

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"golang.org/x/sync/errgroup"

	"krgimage/services/state"
	"krgimage/services/state/statetest"
)

// limit is for a loaded machine.
const limit = 2 * time.Minute

func bounded(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

// soon is for what never succeeds.
func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func member(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Embedded(bounded(t), MemberConfig{Dir: dir, Namespace: "krg"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestEmbedded(t *testing.T) {
	statetest.Run(t, func(t *testing.T) state.Store { return member(t, filepath.Join(t.TempDir(), "etcd")) })
}

func set(t *testing.T, s state.Store, key, value string) {
	t.Helper()
	if _, err := s.Apply(bounded(t), state.Txn{Puts: []state.Put{{Key: key, Value: []byte(value)}}}); err != nil {
		t.Fatal(err)
	}
}

func TestRestart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "etcd")
	s := member(t, dir)
	set(t, s, "a", "1")
	set(t, s, "a", "2")
	before, err := s.Get(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the directory: %v, %v", info.Mode(), err)
	}
	s = member(t, dir)
	after, err := s.Get(t.Context(), "a")
	if err != nil || after.Mod != before.Mod || string(after.Value) != "2" {
		t.Errorf("after a restart: %+v, %v; was %+v", after, err, before)
	}
	for events, err := range s.Watch(bounded(t), "", before.Mod-1) {
		if err != nil || len(events) != 1 || string(events[0].Value) != "2" {
			t.Errorf("a watch from before the restart: %v, %v", events, err)
		}
		break
	}
}

// TestKilled takes the data as they are while the member runs, which is what is
// left when the process is killed.
func TestKilled(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "etcd")
	s := member(t, dir)
	for i := range 50 {
		set(t, s, "n", fmt.Sprint(i))
	}
	left := filepath.Join(t.TempDir(), "etcd")
	if err := os.CopyFS(left, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if e, err := member(t, left).Get(t.Context(), "n"); err != nil || string(e.Value) != "49" {
		t.Errorf("%q, %v", e.Value, err)
	}
}

// TestNoListener looks at all of the process's sockets.
func TestNoListener(t *testing.T) {
	before := listening(t)
	member(t, filepath.Join(t.TempDir(), "etcd"))
	for inode := range listening(t) {
		if !before[inode] {
			t.Errorf("the member listens: socket %s", inode)
		}
	}
}

// listening are the inodes of this process's sockets that listen.
func listening(t *testing.T) map[string]bool {
	t.Helper()
	own := map[string]bool{}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if target, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(target, "socket:[") {
			own[strings.Trim(target, "socket:[]")] = true
		}
	}
	found := map[string]bool{}
	for _, name := range []string{"tcp", "tcp6", "unix"} {
		text, err := os.ReadFile("/proc/self/net/" + name)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line)
			switch {
			case name == "unix" && len(f) > 6 && f[3] == "00010000" && own[f[6]]: // __SO_ACCEPTCON
				found[f[6]] = true
			case name != "unix" && len(f) > 9 && f[3] == "0A" && own[f[9]]: // TCP_LISTEN
				found[f[9]] = true
			}
		}
	}
	return found
}

// TestDamaged changes each file of the data in turn. The member either starts
// with all of the data, since etcd repairs a log whose end is torn, or refuses
// with advice and leaves the file alone.
func TestDamaged(t *testing.T) {
	whole := filepath.Join(t.TempDir(), "etcd")
	s := member(t, whole)
	for i := range 200 {
		set(t, s, fmt.Sprintf("k/%d", i), strings.Repeat("x", 200))
	}
	s.Close()
	var files []string
	filepath.WalkDir(whole, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			rel, _ := filepath.Rel(whole, path)
			files = append(files, rel)
		}
		return err
	})
	if len(files) < 3 {
		t.Fatalf("%v: expected a database, a log and the membership", files)
	}
	refused := 0
	for _, file := range files {
		for name, damage := range map[string]func([]byte) []byte{
			"empty":   func([]byte) []byte { return nil },
			"garbage": func(b []byte) []byte { return bytes.Repeat([]byte("garbage!"), len(b)/8) },
			"cut":     func(b []byte) []byte { return b[:len(b)/3] },
			"zeros":   func(b []byte) []byte { clear(b[len(b)/8 : len(b)/2]); return b },
			"missing": nil,
		} {
			t.Run(file+" "+name, func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "etcd")
				if err := os.CopyFS(dir, os.DirFS(whole)); err != nil {
					t.Fatal(err)
				}
				path := filepath.Join(dir, file)
				if damage == nil {
					if err := os.Remove(path); err != nil {
						t.Fatal(err)
					}
				} else {
					data, err := os.ReadFile(path)
					if err != nil {
						t.Fatal(err)
					}
					if err := os.WriteFile(path, damage(data), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				s, err := Embedded(bounded(t), MemberConfig{Dir: dir, Namespace: "krg"})
				if err == nil {
					defer s.Close()
					if entries, _, err := s.List(t.Context(), "k/"); err != nil || len(entries) != 200 {
						t.Errorf("started with %d of 200 entries, %v", len(entries), err)
					}
					return
				}
				refused++
				bad := (*DirError)(nil)
				if !errors.As(err, &bad) || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "backup") {
					t.Errorf("the error doesn't say what to do: %v", err)
				}
				if testing.Verbose() {
					t.Log(err)
				}
			})
		}
	}
	if refused < 5 {
		t.Errorf("only %d kinds of damage were noticed", refused)
	}
}

// TestCutOffAtFirstStart has the process killed before the member was ever ready.
func TestCutOffAtFirstStart(t *testing.T) {
	for name, left := range map[string][]string{
		"no data":     {},
		"no log":      {"member/snap/db"},
		"an open log": {"member/snap/db", "member/wal/0.tmp"},
	} {
		t.Run(name, func(t *testing.T) {
			config := MemberConfig{Dir: t.TempDir(), Namespace: "krg"}
			if err := config.remember(); err != nil {
				t.Fatal(err)
			}
			for _, file := range left {
				path := filepath.Join(config.Dir, file)
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte("half"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			set(t, member(t, config.Dir), "k", "v")
		})
	}
}

func TestOtherHeads(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "etcd")
	member(t, dir).Close()
	_, err := Embedded(bounded(t), MemberConfig{Dir: dir, Name: "a", Heads: map[string]string{"a": "https://127.0.0.1:1"}})
	if bad := (*DirError)(nil); !errors.As(err, &bad) || !strings.Contains(err.Error(), "cluster.store") {
		t.Errorf("a directory made for one head was used for others: %v", err)
	}
}

// certificates makes an authority and a certificate for 127.0.0.1, as an admin
// would with a tool.
func certificates(t *testing.T) Files {
	t.Helper()
	dir := t.TempDir()
	f := Files{CA: filepath.Join(dir, "ca.pem"), Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem")}
	make := func(parent *x509.Certificate, signer *ecdsa.PrivateKey, path string, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template.SerialNumber, template.NotBefore, template.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
		template.Subject, template.BasicConstraintsValid = pkix.Name{CommonName: filepath.Base(path)}, true
		if parent == nil {
			parent, signer = template, key
		}
		der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert, key
	}
	ca, caKey := make(nil, nil, f.CA, &x509.Certificate{IsCA: true, KeyUsage: x509.KeyUsageCertSign})
	_, key := make(ca, caKey, f.Cert, &x509.Certificate{
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(f.Key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return f
}

// freePort is a TCP port of loopback that was free a moment ago.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestThreeHeads(t *testing.T) {
	ctx := bounded(t)
	files, root := certificates(t), t.TempDir()
	heads := map[string]string{}
	for _, name := range []string{"a", "b", "c"} {
		heads[name] = "https://" + freePort(t)
	}
	var mu sync.Mutex
	stores := map[string]*Store{}
	begin := func(ctx context.Context, name string) error {
		s, err := Embedded(ctx, MemberConfig{Dir: filepath.Join(root, name), Namespace: "krg", Heads: heads, Name: name, Files: files})
		if err == nil {
			mu.Lock()
			defer mu.Unlock()
			stores[name] = s
		}
		return err
	}
	defer func() {
		for _, s := range stores {
			s.Close()
		}
	}()
	var all errgroup.Group
	for name := range heads {
		all.Go(func() error { return begin(ctx, name) })
	}
	if err := all.Wait(); err != nil {
		t.Fatal(err)
	}
	set(t, stores["a"], "k", "1")
	if e, err := stores["b"].Get(ctx, "k"); err != nil || string(e.Value) != "1" {
		t.Fatalf("what a wrote is not at b: %q, %v", e.Value, err)
	}
	e, err := stores["c"].Get(ctx, "k")
	if err != nil {
		t.Fatal(err)
	}
	// One head stops: the others go on, also with a watch that began before.
	changes := make(chan string, 10)
	go func() {
		defer close(changes)
		for events, err := range stores["b"].Watch(ctx, "", e.Mod) {
			if err != nil {
				return
			}
			for _, e := range events {
				changes <- string(e.Value)
			}
		}
	}()
	stores["a"].Close()
	delete(stores, "a")
	for value := 2; value <= 3; value++ {
		for { // there is no leader for a moment if a was it
			_, err := stores["c"].Apply(ctx, state.Txn{Puts: []state.Put{{Key: "k", Value: fmt.Append(nil, value)}}})
			if err == nil {
				break
			}
			if ctx.Err() != nil {
				t.Fatal(err)
			}
		}
	}
	for value := range changes {
		if value == "3" {
			break
		}
	}
	if ctx.Err() != nil {
		t.Fatal("the watch at b didn't see the change made at c")
	}
	// It comes back and knows what it missed.
	if err := begin(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if e, err := stores["a"].Get(ctx, "k"); err != nil || string(e.Value) != "3" {
		t.Errorf("back again: %q, %v", e.Value, err)
	}
	// Alone it does nothing, and says so in time.
	stores["b"].Close()
	stores["c"].Close()
	short, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if _, err := stores["a"].Apply(short, state.Txn{Puts: []state.Put{{Key: "k"}}}); err == nil {
		t.Error("one of three heads wrote")
	}
}

// TestHeadsRefuse has a stranger talk to a head's port.
func TestHeadsRefuse(t *testing.T) {
	_, err := Embedded(bounded(t), MemberConfig{Dir: t.TempDir(), Name: "a", Heads: map[string]string{"a": "http://127.0.0.1:1"}})
	if err == nil || !strings.Contains(err.Error(), "https") {
		t.Errorf("heads without TLS: %v", err)
	}
	files := certificates(t)
	addr := freePort(t)
	s, err := Embedded(bounded(t), MemberConfig{Dir: filepath.Join(t.TempDir(), "etcd"), Name: "a", Heads: map[string]string{"a": "https://" + addr}, Files: files})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for name, f := range map[string]Files{"no certificate": {CA: files.CA}, "another authority's": {CA: files.CA, Cert: certificates(t).Cert}} {
		if f.Cert != "" {
			f.Key = filepath.Join(filepath.Dir(f.Cert), "key.pem")
		}
		if stranger, err := Existing(soon(t), ExistingConfig{URLs: []string{"https://" + addr}, Files: f}); err == nil {
			stranger.Close()
			t.Errorf("%s: a stranger was let in", name)
		}
	}
}

// existing is an etcd as somebody else runs it.
func existing(t *testing.T, files Files, ops uint) string {
	t.Helper()
	addr := freePort(t)
	own := url.URL{Scheme: "https", Host: addr}
	config, err := MemberConfig{Dir: t.TempDir()}.embed(logger(nil))
	if err != nil {
		t.Fatal(err)
	}
	config.ListenClientUrls, config.AdvertiseClientUrls = []url.URL{own}, []url.URL{own}
	config.ClientTLSInfo.CertFile, config.ClientTLSInfo.KeyFile = files.Cert, files.Key
	config.ClientTLSInfo.TrustedCAFile, config.ClientTLSInfo.ClientCertAuth = files.CA, true
	config.MaxTxnOps = ops
	e, err := embed.StartEtcd(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	select {
	case <-e.Server.ReadyNotify():
	case <-bounded(t).Done():
		t.Fatal("the etcd doesn't get ready")
	}
	return own.String()
}

func TestExisting(t *testing.T) {
	files := certificates(t)
	statetest.Run(t, func(t *testing.T) state.Store {
		s, err := Existing(bounded(t), ExistingConfig{URLs: []string{existing(t, files, state.MaxOps)}, Files: files, Namespace: "cluster/krg"})
		if err != nil {
			t.Fatal(err)
		}
		return s
	})
}

func TestExistingRefused(t *testing.T) {
	files := certificates(t)
	small := existing(t, files, 128)
	for name, tt := range map[string]struct {
		url   string
		files Files
		want  string
	}{
		"nobody there":            {"https://" + freePort(t), files, "doesn't answer"},
		"no certificate":          {small, Files{CA: files.CA}, "doesn't answer"},
		"another's authority":     {small, certificates(t), "doesn't answer"},
		"missing file":            {small, Files{CA: files.CA + "x"}, "no such file"},
		"no PEM":                  {small, Files{CA: files.Key}, "no PEM certificate"},
		"transactions too small":  {small, files, "--max-txn-ops=1024"},
		"key without certificate": {small, Files{CA: files.CA, Key: files.Key}, "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := soon(t)
			if tt.want != "doesn't answer" {
				ctx = bounded(t)
			}
			s, err := Existing(ctx, ExistingConfig{URLs: []string{tt.url}, Files: tt.files})
			if err == nil {
				s.Close()
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v\nwant %q", err, tt.want)
			}
		})
	}
}

// TestQuiet starts and stops a member and reads what it logs at the head's level.
func TestQuiet(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelInfo}))
	s, err := Embedded(bounded(t), MemberConfig{Dir: filepath.Join(t.TempDir(), "etcd"), Namespace: "krg", Log: log})
	if err != nil {
		t.Fatal(err)
	}
	set(t, s, "a", "1")
	s.Close()
	for line := range strings.Lines(out.String()) {
		if !strings.Contains(line, "took too long") { // a loaded machine
			t.Errorf("logged: %s", line)
		}
	}
}

func BenchmarkStart(b *testing.B) {
	dir := filepath.Join(b.TempDir(), "etcd")
	for b.Loop() {
		s, err := Embedded(b.Context(), MemberConfig{Dir: dir, Namespace: "krg"})
		if err != nil {
			b.Fatal(err)
		}
		s.Close()
	}
}

func BenchmarkApply(b *testing.B) {
	s, err := Embedded(b.Context(), MemberConfig{Dir: filepath.Join(b.TempDir(), "etcd"), Namespace: "krg"})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	for b.Loop() {
		if _, err := s.Apply(b.Context(), state.Txn{Puts: []state.Put{{Key: "k", Value: make([]byte, 200)}}}); err != nil {
			b.Fatal(err)
		}
	}
}
