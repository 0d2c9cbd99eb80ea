package debian

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/nfsroot/debian/space"
	"krgimage/nfsroot/debian/tarfs"
)

const status = `Package: bash
Status: install ok installed
Architecture: amd64
Source: bash-src (1)
Version: 5.2-1
Description: a shell
 that folds
 .

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1

Package: adduser
Status: install ok installed
Architecture: all
Source: adduser
Version: 3
`

func TestRootFilter(t *testing.T) {
	epoch := time.Unix(1700000000, 0)
	var raw bytes.Buffer
	w := tar.NewWriter(&raw)
	for _, h := range []tar.Header{
		{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "./etc/machine-id"}, {Name: "./etc/resolv.conf"}, {Name: "./etc/hostname"},
		{Name: "./etc/ssh/ssh_host_rsa_key"}, {Name: "./etc/ssh/sshd_config"},
		{Name: "./etc/apt/apt.conf.d/99mmdebstrap"}, {Name: "./etc/apt/sources.list.d/0000main.list"}, {Name: "./etc/apt/sources.list"},
		{Name: "./var/log/apt/", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "./var/log/apt/term.log"},
		{Name: "./var/cache/apt/pkgcache.bin"}, {Name: "./var/lib/apt/lists/", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "./var/lib/apt/lists/x_Packages"},
		{Name: "./usr/bin/ping", PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "cap"}, Mode: 0o755},
		{Name: "./usr/bin/su", Mode: 0o4755, Uname: "root"},
		{Name: "./dev/null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3},
		{Name: "./usr/bin/new", ModTime: epoch.Add(time.Hour)},
	} {
		h.Format = tar.FormatPAX
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.WriteHeader(&tar.Header{Name: "./var/lib/dpkg/status", Size: int64(len(status))}); err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, status)
	w.Close()

	f := rootFilter{epoch: epoch, sources: "Types: deb\n"}
	var out bytes.Buffer
	if err := f.copy(&raw, &out); err != nil {
		t.Fatal(err)
	}
	var names []string
	in := tar.NewReader(&out)
	for {
		h, err := in.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
		if h.ModTime.After(epoch) || h.Uname != "" {
			t.Errorf("%s: %v %q", h.Name, h.ModTime, h.Uname)
		}
		switch h.Name {
		case "usr/bin/ping":
			if h.PAXRecords["SCHILY.xattr.security.capability"] != "cap" {
				t.Error("ping lost its capabilities")
			}
		case "usr/bin/su":
			if h.Mode != 0o4755 {
				t.Errorf("su: %o", h.Mode)
			}
		case "dev/null":
			if h.Typeflag != tar.TypeChar || h.Devmajor != 1 || h.Devminor != 3 {
				t.Errorf("%+v", h)
			}
		}
	}
	want := []string{"./", "etc/ssh/sshd_config", "var/log/apt/", "var/lib/apt/lists/", "usr/bin/ping", "usr/bin/su", "dev/null", "usr/bin/new", "var/lib/dpkg/status", "etc/apt/sources.list.d/debian.sources", "usr/sbin/policy-rc.d"}
	if !slices.Equal(names, want) {
		t.Errorf("%q\nwant %q", names, want)
	}
	if !slices.Equal(f.packages, []Package{{"adduser", "3", "all", ""}, {"bash", "5.2-1", "amd64", "bash-src"}}) {
		t.Errorf("%v", f.packages)
	}
}

func TestEmptyRootIsRefused(t *testing.T) {
	f := rootFilter{}
	if err := f.copy(strings.NewReader(""), io.Discard); err == nil {
		t.Error("an empty archive is a root")
	}
}

func TestFinalSourcesNameTheMirrors(t *testing.T) {
	mirrors, err := mirrorsOf(Options{Suite: "trixie", Mirror: "https://user:secret@mirror.example/debian/", Security: "http://sec.example/s"})
	if err != nil {
		t.Fatal(err)
	}
	r := &Repo{opt: Options{Components: []string{"main", "contrib"}}, mirrors: mirrors, keyring: "/k.gpg"}
	want := `# Written by krgimage; see debian: in cluster.yaml.
Types: deb
URIs: https://mirror.example/debian
Suites: trixie trixie-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://sec.example/s
Suites: trixie-security
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
`
	if got := r.finalSources(); got != want {
		t.Errorf("%s", got)
	}
	if got := r.sources([]string{"main"}); !strings.HasPrefix(got, "deb [signed-by=/k.gpg arch=amd64] http://mirror.example/debian trixie main\n") {
		t.Errorf("%s", got)
	}
}

const packages = `Package: linux-image-amd64
Version: 6.12.107-1
Architecture: amd64
Depends: linux-image-6.12.107-amd64 (= 6.12.107-1)
Filename: pool/main/l/a.deb
Size: 10
SHA256: aa

Package: linux-image-amd64
Version: 6.12.117-1
Architecture: amd64
Depends: linux-image-6.12.117-amd64 (= 6.12.117-1), x | y
Filename: pool/main/l/b.deb
Size: 11
Installed-Size: 5
SHA256: bb

Package: postfix
Version: 1
Provides: mail-transport-agent, smtpd (= 1)
Filename: pool/main/p/p.deb
SHA256: cc
`

func testIndex(t *testing.T) *index {
	idx := &index{byName: map[string][]*entry{}, provided: map[string][]string{}}
	u, _ := url.Parse("http://m.example/debian")
	if err := idx.read(strings.NewReader(packages), mirror{upstream: u}, "main", nil); err != nil {
		t.Fatal(err)
	}
	return idx
}

func TestIndex(t *testing.T) {
	idx := testIndex(t)
	e, err := idx.newest("linux-image-amd64")
	if err != nil || e.Version != "6.12.117-1" || e.size != 11 || e.installed != 5120 || !slices.Equal(e.depends, []string{"linux-image-6.12.117-amd64", "x"}) {
		t.Errorf("%+v %v", e, err)
	}
	if up, key, err := e.location(); err != nil || up.String() != "http://m.example/debian/pool/main/l/b.deb" || key != "m.example/debian/pool/main/l/b.deb" {
		t.Errorf("%v %s %v", up, key, err)
	}
	for name, want := range map[string]string{"postfix": "", "postfix=1": "", "mail-transport-agent": "", "smtpd": "", "postfiks": "did you mean postfix?", "zzz": "packages.debian.org"} {
		err := idx.check(name, []string{"main"})
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := idx.check("postfix", []string{"contrib"}); err == nil || !strings.Contains(err.Error(), "debian.components") {
		t.Errorf("%v", err)
	}
	if err := idx.read(strings.NewReader("Package: x\nVersion: 1\nFilename: ../../etc/passwd\nSHA256: a\n"), mirror{upstream: &url.URL{}}, "main", nil); err == nil {
		t.Error("a file name that leaves the archive is taken")
	}
}

func FuzzStanzas(f *testing.F) {
	f.Add(status)
	f.Add(packages)
	f.Fuzz(func(t *testing.T, text string) {
		list, err := ParseStatus(strings.NewReader(text))
		if err == nil && slices.ContainsFunc(list, func(p Package) bool { return p.Name == "" }) {
			t.Error("a package without a name")
		}
	})
}

func TestLastLines(t *testing.T) {
	log := []byte("Get:1 x\nE: Unable to locate\n\nW: more\nE: second\n")
	if got := lastLines(log, 5); got != "    E: Unable to locate\n    E: second" {
		t.Errorf("%q", got)
	}
	if got := lastLines([]byte("a\nb\nc\n"), 2); got != "    b\n    c" {
		t.Errorf("%q", got)
	}
}

func TestExplain(t *testing.T) {
	dir := t.TempDir()
	repo := &Repo{opt: Options{Suite: "trixie", WorkDir: dir}, keyring: "/k.gpg", proxy: &proxy{}}
	for text, want := range map[string]string{
		"E: The repository is not signed.\nNO_PUBKEY 0E98404D386FA1D9\n": "debian-archive-keyring",
		"tar: write error: No space left on device\n":                    "no space left",
		"I: x\nE: something odd\n":                                       "E: something odd",
	} {
		log := filepath.Join(dir, "x.log")
		if err := os.WriteFile(log, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		err := repo.explainIn("the packages", log, dir, errors.New("exit status 100"))
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q gives %v", text, err)
		}
	}
}

// smallDisk mounts a file system of the given size.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting a small file system needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skipf("no tmpfs can be mounted here: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func TestFullDiskKeepsOldOutput(t *testing.T) {
	dir := smallDisk(t, "256k")
	out := filepath.Join(dir, "modules.tar.zst")
	if err := os.WriteFile(out, []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	modules := t.TempDir()
	for i := range 4 {
		f := filepath.Join(modules, string(rune('a'+i)))
		if err := os.WriteFile(f, pseudo(i), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	err := ModulesTar(t.Context(), Kernel{Release: "6", Modules: modules}, time.Unix(0, 0), out, nil)
	var full *space.Error
	if !errors.As(err, &full) || full.Mount != dir || !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("%v", err)
	}
	if got, _ := os.ReadFile(out); string(got) != "old" {
		t.Errorf("the old output is now %q", got)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("left over: %v", entries)
	}
}

// pseudo is 512 KiB that don't compress: xorshift.
func pseudo(seed int) []byte {
	b := make([]byte, 512<<10)
	x := uint32(seed + 1)
	for i := range b {
		x ^= x << 13
		x ^= x >> 17
		x ^= x << 5
		b[i] = byte(x)
	}
	return b
}

func TestFullDiskInCache(t *testing.T) {
	m := newMirror(t)
	m.files[debPath] = pseudo(1)
	p, _ := testProxy(t, smallDisk(t, "128k"), m.mirror(t))
	up, _ := url.Parse(m.URL + debPath)
	_, err := p.fetch(t.Context(), up.Host+debPath, up, nil)
	var full *space.Error
	if !errors.As(err, &full) || !errors.As(p.takeErr(), &full) {
		t.Errorf("%v", err)
	}
}

func TestModulesTarIsSortedAndNeutral(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"b/x.ko.xz", "a/y.ko.xz", "modules.dep"} {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := tarfs.Write(t.Context(), w, dir, "usr/lib/modules/6", time.Unix(5, 0)); err != nil {
		t.Fatal(err)
	}
	w.Close()
	var names []string
	in := tar.NewReader(&b)
	for {
		h, err := in.Next()
		if err != nil {
			break
		}
		names = append(names, strings.TrimPrefix(h.Name, "usr/lib/modules/6/"))
		if h.Uid != 0 || h.Gid != 0 || h.ModTime.Unix() != 5 {
			t.Errorf("%+v", h)
		}
	}
	if !slices.Equal(names, []string{"", "a/", "a/y.ko.xz", "b/", "b/x.ko.xz", "modules.dep"}) {
		t.Errorf("%q", names)
	}
}

func TestPreflightNamesFixes(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	for _, c := range Preflight("trixie") {
		if !c.OK && c.Fix == "" {
			t.Errorf("%s: no fix", c.Name)
		}
		if c.Name == "mmdebstrap" && (c.OK || c.Fix != "apt-get install mmdebstrap") {
			t.Errorf("%+v", c)
		}
	}
}
