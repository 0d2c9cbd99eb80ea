package ra

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"net"
	"net/netip"
	"testing"
)

var (
	router = net.HardwareAddr{0x52, 0x54, 0, 0xff, 0, 0xfe}
	host   = net.HardwareAddr{0x52, 0x54, 0, 0x12, 0x34, 0x56}
)

// solicit builds a solicitation like those of iPXE and Linux.
func solicit(src, dst string, options ...byte) []byte {
	from, to := netip.MustParseAddr(src), netip.MustParseAddr(dst)
	message := append([]byte{typeSolicit, 0, 0, 0, 0, 0, 0, 0}, options...)
	binary.BigEndian.PutUint16(message[2:], checksum(from, to, message))
	frame := append([]byte{}, allRoutersMAC...)
	frame = append(frame, host...)
	frame = append(frame, 0x86, 0xdd, 0x60, 0, 0, 0, 0, byte(len(message)), protoICMPv6, hopLimit)
	frame = append(frame, from.AsSlice()...)
	frame = append(frame, to.AsSlice()...)
	return append(frame, message...)
}

// linkLayer is the source link-layer address option.
var linkLayer = append([]byte{optSourceLink, 1}, host...)

// ipxe is a solicitation as captured from QEMU's iPXE.
const ipxe = "33330000000252540012345686dd6000000000103afffe80000000000000505400fffe123456" +
	"ff020000000000000000000000000002850071b5000000000101525400123456"

// The advertisement, byte for byte, but for its checksum.
const (
	toAll  = "333300000001" + "525400ff00fe" + "86dd" + "60000000" + "0018" + "3aff"
	toHost = "525400123456" + "525400ff00fe" + "86dd" + "60000000" + "0018" + "3aff"
	from   = "fe800000000000006b72525400ff00fe"
	empty  = "00000000" + "00000000" + "00000000" + "0101" + "525400ff00fe"
)

func TestReply(t *testing.T) {
	good := solicit("::", "ff02::2")
	change := func(at int, to byte) []byte { f := bytes.Clone(good); f[at] = to; return f }
	for _, tt := range []struct {
		name, header string
		frame        []byte
		dst          string
	}{
		{"from nobody", toAll, good, "ff02::1"},
		{"captured from iPXE", toHost, fromHex(t, ipxe), "fe80::5054:ff:fe12:3456"},
		{"from a host with its option", toHost, solicit("fe80::5054:ff:fe12:3456", "ff02::2", linkLayer...), "fe80::5054:ff:fe12:3456"},
		{"to the router itself", toHost, solicit("fe80::1", "fe80::2"), "fe80::1"},
		{"padded by the wire", toAll, append(bytes.Clone(good), 0, 0, 0), "ff02::1"},

		{"empty", "", nil, ""},
		{"cut", "", good[:len(good)-1], ""},
		{"IPv4", "", change(12, 0x08), ""},
		{"not IPv6 inside", "", change(14, 0x40), ""},
		{"UDP", "", change(20, 17), ""},
		{"came through a router", "", change(21, 254), ""},
		{"an advertisement", "", change(54, typeAdvert), ""},
		{"code not 0", "", change(55, 1), ""},
		{"bad checksum", "", change(56, good[56]^1), ""},
		{"length beyond the frame", "", change(19, 200), ""},
		{"length below the header", "", change(19, 4), ""},
		{"from a group", "", change(6, 0x33), ""},
		{"from nobody with an option", "", solicit("::", "ff02::2", linkLayer...), ""},
		{"from a global address", "", solicit("2001:db8::1", "ff02::2"), ""},
		{"option of length 0", "", solicit("fe80::1", "ff02::2", 1, 0, 0, 0, 0, 0, 0, 0), ""},
		{"option too long", "", solicit("fe80::1", "ff02::2", 1, 2, 0, 0, 0, 0, 0, 0), ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := Reply(tt.frame, router)
			if tt.dst == "" {
				if got != nil {
					t.Fatalf("answered with %x", got)
				}
				return
			}
			dst := netip.MustParseAddr(tt.dst)
			if len(got) < 58 {
				t.Fatalf("answer %x", got)
			}
			sum := hex.EncodeToString(got[56:58])
			want := tt.header + from + hex.EncodeToString(dst.AsSlice()) + "8600" + sum + empty
			if hex.EncodeToString(got) != want {
				t.Fatalf("\n got %x\nwant %s", got, want)
			}
			if !sumsUp(got) {
				t.Error("wrong checksum")
			}
		})
	}
	if Reply(good, nil) != nil {
		t.Error("answered without an address of its own")
	}
}

// sumsUp checks the checksum of an ICMPv6 frame the long way round: bytes of the
// pseudo header laid out and added as RFC 1071 §1 says.
func sumsUp(frame []byte) bool {
	packet := frame[14:]
	pseudo := append([]byte{}, packet[8:40]...)
	pseudo = append(pseudo, 0, 0, packet[4], packet[5], 0, 0, 0, protoICMPv6)
	pseudo = append(pseudo, packet[40:]...)
	sum := 0
	for i := 0; i+1 < len(pseudo); i += 2 {
		sum += int(pseudo[i])<<8 | int(pseudo[i+1])
	}
	return sum%0xffff == 0 && sum != 0
}

func fromHex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func FuzzReply(f *testing.F) {
	f.Add(fromHex(f, ipxe))
	f.Add(solicit("::", "ff02::2"))
	f.Add(solicit("fe80::1", "ff02::2", linkLayer...))
	f.Add(make([]byte, 62))
	f.Fuzz(func(t *testing.T, frame []byte) {
		before := bytes.Clone(frame)
		got := Reply(frame, router)
		if !bytes.Equal(before, frame) {
			t.Error("the question was changed")
		}
		if got != nil && (!sumsUp(got) || got[0]&1 == 1 && !bytes.Equal(got[:6], allNodesMAC)) {
			t.Errorf("answer %x", got)
		}
		if got != nil && Reply(got, router) != nil {
			t.Error("an answer is answered")
		}
	})
}
