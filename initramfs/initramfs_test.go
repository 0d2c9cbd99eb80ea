package initramfs

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/cpio"
	"github.com/ulikunitz/xz"
)

const release = "6.12.0-test"

// testSource lays out a small kernel: r8169 needs mdio and, softly, realtek;
// e1000 needs nothing; nfsv3 needs nfs, which needs sunrpc.
func testSource(t *testing.T) Source {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "lib/modules", release)
	modules := map[string][]byte{
		"kernel/net/r8169.ko.xz":    compress(t, module(t, "firmware=rtl_nic/a.fw", "firmware=rtl_nic/lost.fw", "alias=pci:v10EC*")),
		"kernel/net/mdio.ko":        module(t),
		"kernel/net/realtek.ko.xz":  compress(t, module(t)),
		"kernel/net/e1000.ko":       module(t),
		"kernel/fs/nfsv3.ko":        module(t),
		"kernel/fs/nfs.ko":          module(t),
		"kernel/net/sunrpc.ko":      module(t),
		"kernel/extra/my-driver.ko": module(t, "firmware=mine/v*.bin"),
	}
	for name, data := range modules {
		write(t, filepath.Join(dir, name), data)
	}
	write(t, filepath.Join(dir, "modules.dep"), []byte(`kernel/net/r8169.ko.xz: kernel/net/mdio.ko
kernel/net/mdio.ko:
kernel/net/realtek.ko.xz: kernel/net/mdio.ko
kernel/net/e1000.ko:
kernel/fs/nfsv3.ko: kernel/fs/nfs.ko kernel/net/sunrpc.ko
kernel/fs/nfs.ko: kernel/net/sunrpc.ko
kernel/net/sunrpc.ko:
kernel/extra/my-driver.ko:
`))
	write(t, filepath.Join(dir, "modules.softdep"), []byte("# softdeps\nsoftdep r8169 pre: realtek\nsoftdep other pre: x\n"))
	write(t, filepath.Join(dir, "modules.alias"), []byte("alias pci:v10EC* r8169\nalias pci:v8086* e1000\nalias pci:v9999* my_driver\n"))
	write(t, filepath.Join(dir, "modules.builtin"), []byte("kernel/fs/ext4.ko\n"))

	firmware := t.TempDir()
	write(t, filepath.Join(firmware, "rtl_nic/a.fw"), []byte("blob a"))
	write(t, filepath.Join(firmware, "mine/v1.bin"), []byte("blob 1"))
	write(t, filepath.Join(firmware, "mine/v2.bin.xz"), []byte("blob 2"))
	return Source{Modules: dir, Firmware: firmware}
}

func TestModulesCarriesTheClosure(t *testing.T) {
	var out bytes.Buffer
	sel, err := Modules(&out, testSource(t), []string{"my-driver", "ext4"})
	if err != nil {
		t.Fatal(err)
	}
	want := Selection{
		Release: release,
		Modules: []string{"kernel/extra/my-driver.ko", "kernel/fs/nfs.ko", "kernel/fs/nfsv3.ko", "kernel/net/e1000.ko",
			"kernel/net/mdio.ko", "kernel/net/r8169.ko", "kernel/net/realtek.ko", "kernel/net/sunrpc.ko"},
		Firmware:        []string{"mine/v1.bin", "mine/v2.bin.xz", "rtl_nic/a.fw"},
		MissingFirmware: []string{"rtl_nic/lost.fw"},
		RawBytes:        sel.RawBytes,
	}
	if diff := cmp.Diff(want, sel); diff != "" {
		t.Errorf("selection (-want +got):\n%s", diff)
	}
	files := unpack(t, out.Bytes())
	base := "lib/modules/" + release + "/"
	for name, want := range map[string]string{
		base + "modules.softdep":    "softdep r8169 pre: realtek\n",
		base + "modules.builtin":    "kernel/fs/ext4.ko\n",
		"lib/firmware/rtl_nic/a.fw": "blob a",
	} {
		if files[name] != want {
			t.Errorf("%s = %q, want %q", name, files[name], want)
		}
	}
	if ko := files[base+"kernel/net/r8169.ko"]; len(ko) < 4 || ko[:4] != "\x7fELF" {
		t.Errorf("r8169.ko is not stored uncompressed")
	}
	if !slices.Contains(lines(files[base+"modules.dep"]), "kernel/net/r8169.ko: kernel/net/mdio.ko") {
		t.Errorf("modules.dep doesn't name the stored paths:\n%s", files[base+"modules.dep"])
	}
}

func TestModulesWithoutExtraLeavesOutStrangers(t *testing.T) {
	var out bytes.Buffer
	if _, err := Modules(&out, testSource(t), nil); err != nil {
		t.Fatal(err)
	}
	files := unpack(t, out.Bytes())
	if got := files["lib/modules/"+release+"/modules.alias"]; got != "alias pci:v10EC* r8169\nalias pci:v8086* e1000\n" {
		t.Errorf("modules.alias isn't restricted to what is carried: %q", got)
	}
}

func TestUnknownModule(t *testing.T) {
	_, err := Modules(io.Discard, testSource(t), []string{"driver"})
	var unknown *UnknownModuleError
	if !errors.As(err, &unknown) || !slices.Equal(unknown.Near, []string{"my_driver"}) {
		t.Fatalf("error = %v, want one that suggests my_driver", err)
	}
}

func TestDamagedModule(t *testing.T) {
	src := testSource(t)
	file := filepath.Join(src.Modules, "kernel/net/r8169.ko.xz")
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	write(t, file, data[:len(data)/2])
	if _, err := Modules(io.Discard, src, nil); err == nil {
		t.Fatal("a truncated module was accepted")
	}
}

func TestMembersAreReproducibleAndAligned(t *testing.T) {
	src := testSource(t)
	members := map[string]func(io.Writer) error{
		"init":    func(w io.Writer) error { return Init(w, []byte("binary")) },
		"modules": func(w io.Writer) error { _, err := Modules(w, src, nil); return err },
		"rescue":  func(w io.Writer) error { return Rescue(w, rescueArchive(t)) },
	}
	for name, member := range members {
		var a, b bytes.Buffer
		if err := errors.Join(member(&a), member(&b)); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if !bytes.Equal(a.Bytes(), b.Bytes()) {
			t.Errorf("%s: two builds differ", name)
		}
		if a.Len()%memberAlign != 0 {
			t.Errorf("%s: length %d is not a multiple of %d", name, a.Len(), memberAlign)
		}
	}
}

func TestRescueRefusesGarbage(t *testing.T) {
	if err := Rescue(io.Discard, []byte("this is not a cpio archive, it only has some bytes")); err == nil {
		t.Fatal("garbage was accepted as rescue archive")
	}
}

func rescueArchive(t *testing.T) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := cpio.Newc.Writer(&buf)
	records := []cpio.Record{cpio.Directory("bbin", 0o755), cpio.StaticFile("bbin/bb", "busybox", 0o755), cpio.Symlink("bbin/ls", "bb")}
	if err := errors.Join(cpio.WriteRecords(w, records), cpio.WriteTrailer(w)); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// module makes an ELF object with nothing but a .modinfo section.
func module(t *testing.T, info ...string) []byte {
	t.Helper()
	var modinfo bytes.Buffer
	for _, s := range info {
		modinfo.WriteString(s + "\x00")
	}
	names := "\x00.modinfo\x00.shstrtab\x00"
	const header, section = 64, 64
	dataAt := uint64(header)
	namesAt := dataAt + uint64(modinfo.Len())
	tableAt := (namesAt + uint64(len(names)) + 7) &^ 7
	var out bytes.Buffer
	head := elf.Header64{Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1, Shoff: tableAt,
		Ehsize: header, Shentsize: section, Shnum: 3, Shstrndx: 2}
	copy(head.Ident[:], []byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1})
	put := func(v any) {
		if err := binary.Write(&out, binary.LittleEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	put(head)
	out.Write(modinfo.Bytes())
	out.WriteString(names)
	out.Write(make([]byte, tableAt-uint64(out.Len())))
	put(elf.Section64{})
	put(elf.Section64{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: dataAt, Size: uint64(modinfo.Len()), Addralign: 1})
	put(elf.Section64{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: namesAt, Size: uint64(len(names)), Addralign: 1})
	return out.Bytes()
}

func compress(t *testing.T, data []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := xz.NewWriter(&out)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func unpack(t *testing.T, member []byte) map[string]string {
	t.Helper()
	zr, err := zstd.NewReader(bytes.NewReader(bytes.TrimRight(member, "\x00")))
	if err != nil {
		t.Fatal(err)
	}
	defer zr.Close()
	plain, err := io.ReadAll(zr)
	if err != nil {
		t.Fatal(err)
	}
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(plain)))
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for _, r := range records {
		var buf bytes.Buffer
		if r.ReaderAt != nil {
			if _, err := io.Copy(&buf, io.NewSectionReader(r, 0, int64(r.FileSize))); err != nil {
				t.Fatal(err)
			}
		}
		files[r.Name] = buf.String()
	}
	return files
}

func lines(s string) []string {
	var out []string
	for line := range bytes.Lines([]byte(s)) {
		out = append(out, string(bytes.TrimSpace(line)))
	}
	return out
}

func write(t *testing.T, file string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, data, 0o644); err != nil {
		t.Fatal(err)
	}
}
