package debian

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"krgimage/nfsroot/debian/tarfs"
)

// ErrNoDeb is a file that is not in the format of deb(5).
var ErrNoDeb = errors.New("not a Debian package")

// ExtractDeb unpacks those files of a package for which match holds into dst,
// which must exist; match gets clean names such as "usr/lib/ipxe/snponly.efi",
// nil takes all. The files become the caller's own, and none is ever written
// outside dst. It fails when nothing matched.
func ExtractDeb(ctx context.Context, path string, match func(name string) bool, dst string) error {
	found := 0
	err := withData(ctx, path, func(data io.Reader) error {
		return tarfs.Extract(ctx, data, dst, tarfs.Options{Match: match, Replace: true, Seen: func(string) { found++ }})
	})
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if found == 0 {
		return fmt.Errorf("%s: the package has none of the files looked for", path)
	}
	return nil
}

// bigDeb is the size in bytes from which dpkg-deb decompresses a package: xz in
// Go takes ten times as long, which is 20 s for a kernel.
const bigDeb = 16 << 20

// withData calls use with a package's tar archive of files.
func withData(ctx context.Context, path string, use func(io.Reader) error) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() >= bigDeb {
		if program, err := findTool("dpkg-deb"); err == nil {
			return withDpkg(ctx, program, path, use)
		}
	}
	data, closeData, err := DebMember(f, "data.tar")
	if err != nil {
		return err
	}
	defer closeData()
	return use(data)
}

func withDpkg(ctx context.Context, program, path string, use func(io.Reader) error) error {
	var messages bytes.Buffer
	cmd := exec.CommandContext(ctx, program, "--fsys-tarfile", path)
	cmd.Env, cmd.Stderr = cleanEnv(), &messages
	stopGently(cmd)
	data, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	useErr := use(data)
	// After tar's end there is padding; a program that cannot write it fails.
	io.Copy(io.Discard, data)
	switch err := cmd.Wait(); {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case useErr != nil:
		return useErr
	case err != nil:
		return fmt.Errorf("%w: dpkg-deb: %w\n%s", ErrNoDeb, err, lastLines(messages.Bytes(), 2))
	}
	return nil
}

// arMagic begins every ar(5) archive.
const arMagic = "!<arch>\n"

// DebMember finds a member of a package by its name without compression suffix
// ("data.tar", "control.tar") and returns it decompressed.
func DebMember(r io.Reader, name string) (io.Reader, func(), error) {
	in := bufio.NewReaderSize(r, 64<<10)
	magic := make([]byte, len(arMagic))
	if _, err := io.ReadFull(in, magic); err != nil || string(magic) != arMagic {
		return nil, nil, fmt.Errorf("%w: no ar archive", ErrNoDeb)
	}
	for {
		member, size, err := arHeader(in)
		if err == io.EOF {
			return nil, nil, fmt.Errorf("%w: it has no member %s", ErrNoDeb, name)
		}
		if err != nil {
			return nil, nil, err
		}
		if suffix, ok := strings.CutPrefix(member, name); ok && (suffix == "" || suffix[0] == '.') {
			return decompress(&exactReader{r: in, left: size}, suffix)
		}
		if _, err := io.CopyN(io.Discard, in, size+size%2); err != nil {
			return nil, nil, fmt.Errorf("%w: cut off in member %s", ErrNoDeb, member)
		}
	}
}

// arHeader reads a 60-byte member header: name 16, time 12, uid 6, gid 6, mode
// 8, size 10 (decimal), magic 2.
func arHeader(r io.Reader) (name string, size int64, err error) {
	var h [60]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		if err == io.EOF {
			return "", 0, io.EOF
		}
		return "", 0, fmt.Errorf("%w: cut off in a header", ErrNoDeb)
	}
	if !bytes.Equal(h[58:], []byte("`\n")) {
		return "", 0, fmt.Errorf("%w: bad member header", ErrNoDeb)
	}
	name = strings.TrimSuffix(strings.TrimRight(string(h[:16]), " "), "/")
	size, err = strconv.ParseInt(strings.TrimRight(string(h[48:58]), " "), 10, 64)
	if err != nil || size < 0 {
		return "", 0, fmt.Errorf("%w: member %q has size %q", ErrNoDeb, name, h[48:58])
	}
	return name, size, nil
}

// decompress opens a compressed stream by its file name suffix.
func decompress(r io.Reader, suffix string) (io.Reader, func(), error) {
	switch suffix {
	case "":
		return r, func() {}, nil
	case ".gz":
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, nil, err
		}
		return z, func() { z.Close() }, nil
	case ".xz":
		z, err := xz.NewReader(r)
		if err != nil {
			return nil, nil, err
		}
		return z, func() {}, nil
	case ".zst":
		z, err := zstd.NewReader(r)
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	}
	return nil, nil, fmt.Errorf("%w: unknown compression %q", ErrNoDeb, suffix)
}

// exactReader is a member's content; a file that ends inside it is an error.
type exactReader struct {
	r    io.Reader
	left int64
}

func (e *exactReader) Read(b []byte) (int, error) {
	if e.left == 0 {
		return 0, io.EOF
	}
	if int64(len(b)) > e.left {
		b = b[:e.left]
	}
	n, err := e.r.Read(b)
	e.left -= int64(n)
	if err == io.EOF && e.left > 0 {
		return n, io.ErrUnexpectedEOF
	}
	return n, err
}
