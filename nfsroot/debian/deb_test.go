package debian

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"krgimage/nfsroot/debian/tarfs"
)

func sha256Of(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func arMember(name string, data []byte) []byte {
	b := fmt.Appendf(nil, "%-16s%-12d%-6d%-6d%-8o%-10d`\n", name, 0, 0, 0, 0o100644, len(data))
	b = append(b, data...)
	if len(data)%2 == 1 {
		b = append(b, '\n')
	}
	return b
}

func makeDeb(t testing.TB, suffix string, headers ...tar.Header) []byte {
	var data bytes.Buffer
	var z io.WriteCloser
	var err error
	switch suffix {
	case ".gz":
		z = gzip.NewWriter(&data)
	case ".xz":
		z, err = xz.NewWriter(&data)
	case ".zst":
		z, err = zstd.NewWriter(&data)
	}
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(z)
	for _, h := range headers {
		text := h.Linkname
		if h.Typeflag == 0 {
			h.Typeflag, h.Size, h.Linkname = tar.TypeReg, int64(len(text)), ""
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			io.WriteString(w, text)
		}
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	deb := []byte(arMagic)
	deb = append(deb, arMember("debian-binary", []byte("2.0\n"))...)
	deb = append(deb, arMember("control.tar.gz", []byte("odd"))...)
	return append(deb, arMember("data.tar"+suffix, data.Bytes())...)
}

// In these headers a regular file's content is in Linkname.
func TestExtractDeb(t *testing.T) {
	for _, suffix := range []string{".gz", ".xz", ".zst"} {
		deb := makeDeb(t, suffix,
			tar.Header{Name: "./", Typeflag: tar.TypeDir},
			tar.Header{Name: "./usr/lib/ipxe/", Typeflag: tar.TypeDir},
			tar.Header{Name: "./usr/lib/ipxe/snponly.efi", Linkname: "loader", ModTime: time.Unix(1700000000, 0)},
			tar.Header{Name: "./usr/lib/ipxe/other", Linkname: "x"},
			tar.Header{Name: "./usr/lib/ipxe/setuid", Linkname: "x", Mode: 0o4755},
		)
		path, dst := filepath.Join(t.TempDir(), "x.deb"), t.TempDir()
		if err := os.WriteFile(path, deb, 0o644); err != nil {
			t.Fatal(err)
		}
		err := ExtractDeb(t.Context(), path, func(name string) bool { return strings.HasSuffix(name, ".efi") || strings.HasSuffix(name, "setuid") }, dst)
		if err != nil {
			t.Fatal(suffix, err)
		}
		if got, err := os.ReadFile(filepath.Join(dst, "usr/lib/ipxe/snponly.efi")); err != nil || string(got) != "loader" {
			t.Errorf("%s: %q %v", suffix, got, err)
		}
		if info, err := os.Stat(filepath.Join(dst, "usr/lib/ipxe/setuid")); err != nil || info.Mode() != 0o755 {
			t.Errorf("%s: %v %v", suffix, info.Mode(), err)
		}
		if _, err := os.Stat(filepath.Join(dst, "usr/lib/ipxe/other")); err == nil {
			t.Errorf("%s: a file that was not asked for was unpacked", suffix)
		}
		if err := ExtractDeb(t.Context(), path, func(string) bool { return false }, dst); err == nil {
			t.Error("no match is no error")
		}
	}
}

func TestExtractDebStaysInside(t *testing.T) {
	for name, headers := range map[string][]tar.Header{
		"dots":          {{Name: "../evil", Linkname: "x"}},
		"inner dots":    {{Name: "./a/../../evil", Linkname: "x"}},
		"through link":  {{Name: "out", Typeflag: tar.TypeSymlink, Linkname: "../.."}, {Name: "out/evil", Linkname: "x"}},
		"absolute link": {{Name: "out", Typeflag: tar.TypeSymlink, Linkname: os.TempDir()}, {Name: "out/evil", Linkname: "x"}},
		"hard link":     {{Name: "passwd", Typeflag: tar.TypeLink, Linkname: "../../../../etc/passwd"}},
		"link via link": {{Name: "out", Typeflag: tar.TypeSymlink, Linkname: "/etc"}, {Name: "p", Typeflag: tar.TypeLink, Linkname: "out/passwd"}},
	} {
		parent := t.TempDir()
		dst := filepath.Join(parent, "a", "dst")
		if err := os.MkdirAll(dst, 0o755); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "x.deb")
		if err := os.WriteFile(path, makeDeb(t, ".gz", headers...), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := ExtractDeb(t.Context(), path, nil, dst); err == nil {
			t.Errorf("%s: unpacked", name)
		}
		for _, evil := range []string{filepath.Join(parent, "evil"), filepath.Join(parent, "a", "evil"), filepath.Join(os.TempDir(), "evil")} {
			if _, err := os.Lstat(evil); err == nil {
				t.Errorf("%s: %s was written", name, evil)
			}
		}
	}
}

func TestDamagedDeb(t *testing.T) {
	whole := makeDeb(t, ".gz", tar.Header{Name: "./f", Linkname: strings.Repeat("text", 1000)})
	for _, damaged := range [][]byte{nil, []byte("!<arch>\n"), []byte("no package"), whole[:60], whole[:100], whole[:len(whole)-20]} {
		path := filepath.Join(t.TempDir(), "x.deb")
		if err := os.WriteFile(path, damaged, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := ExtractDeb(t.Context(), path, nil, t.TempDir()); err == nil {
			t.Errorf("%d of %d bytes: no error", len(damaged), len(whole))
		}
	}
}

func FuzzExtractDeb(f *testing.F) {
	f.Add(makeDeb(f, ".gz", tar.Header{Name: "./usr/", Typeflag: tar.TypeDir}, tar.Header{Name: "./usr/f", Linkname: "text"}))
	f.Add(makeDeb(f, ".gz", tar.Header{Name: "out", Typeflag: tar.TypeSymlink, Linkname: "../.."}, tar.Header{Name: "out/evil", Linkname: "x"}))
	f.Add([]byte(arMagic))
	f.Fuzz(func(t *testing.T, deb []byte) {
		data, closeData, err := DebMember(bytes.NewReader(deb), "data.tar")
		if err != nil {
			return
		}
		defer closeData()
		parent := t.TempDir()
		dst := filepath.Join(parent, "dst")
		if err := os.Mkdir(dst, 0o755); err != nil {
			t.Fatal(err)
		}
		_ = tarfs.Extract(t.Context(), io.LimitReader(data, 1<<20), dst, tarfs.Options{Replace: true})
		if entries, err := os.ReadDir(parent); err != nil || len(entries) != 1 {
			t.Fatalf("written outside: %v %v", entries, err)
		}
	})
}

func FuzzEntryName(f *testing.F) {
	for _, name := range []string{"./a", "/etc/passwd", "../x", "a/../../x", "", ".", "..", "a//b", "a\x00b", "./..//"} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		clean, err := tarfs.Clean(name)
		if err != nil {
			return
		}
		if !filepath.IsLocal(clean) || strings.HasPrefix(clean, "/") {
			t.Errorf("%q became %q", name, clean)
		}
	})
}

func TestCompareVersions(t *testing.T) {
	versions := []string{
		"0~", "0", "1.0~rc1-1", "1.0-1", "1.0-1+b1", "1.0-1+deb13u1", "1.0-10", "1.0.1", "1.2a", "1.2+", "1.10", "6.12.107-1", "6.12.117-1", "1:0.1", "1:0.1-0", "2:0", "10:0",
	}
	for i, a := range versions {
		for j, b := range versions {
			got := CompareVersions(a, b)
			if a == "1:0.1" && b == "1:0.1-0" || b == "1:0.1" && a == "1:0.1-0" {
				if got != 0 {
					t.Errorf("%s %s: %d, a missing revision is 0", a, b, got)
				}
				continue
			}
			if (got < 0) != (i < j) || (got > 0) != (i > j) {
				t.Errorf("%s, %s: %d", a, b, got)
			}
		}
	}
}

// TestCompareVersionsLikeDpkg has dpkg as the oracle.
func TestCompareVersionsLikeDpkg(t *testing.T) {
	dpkg, err := exec.LookPath("dpkg")
	if err != nil {
		t.Skip("no dpkg here")
	}
	parts := []string{"1", "1.0", "1.0~", "1.0~rc1", "1.0+b1", "1.a", "1.Z", "01.00", "1.0-1", "1.0-1~bpo", "0:1.0-1", "1:0", "1.0-1-1", "1.0+dfsg-1"}
	for _, a := range parts {
		for _, b := range parts {
			want := 0
			if exec.CommandContext(t.Context(), dpkg, "--compare-versions", a, "lt", b).Run() == nil {
				want = -1
			} else if exec.CommandContext(t.Context(), dpkg, "--compare-versions", a, "gt", b).Run() == nil {
				want = 1
			}
			got := CompareVersions(a, b)
			if (got < 0) != (want < 0) || (got > 0) != (want > 0) {
				t.Errorf("%s %s: %d, dpkg says %d", a, b, got, want)
			}
		}
	}
}

func FuzzCompareVersions(f *testing.F) {
	f.Add("1:1.0-1", "1.0~rc1")
	f.Fuzz(func(t *testing.T, a, b string) {
		if got, back := CompareVersions(a, b), CompareVersions(b, a); (got < 0) != (back > 0) || (got == 0) != (back == 0) {
			t.Errorf("%q %q: %d and %d", a, b, got, back)
		}
	})
}
